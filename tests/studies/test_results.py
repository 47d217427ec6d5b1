"""Results of the study: how claims are decided, and that its README says what its results say."""
import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from studies.hybrid_on_cifar10 import data, report
from studies.hybrid_on_cifar10.claims import More, Results, claims, decide, judge, late, verdict

STUDY = Path(__file__).parents[2] / 'studies/hybrid_on_cifar10'

METHODS = ['FD', 'relations', 'MFR, depth 1', 'MFR, depth 8', 'Hybrid, no mask', 'Hybrid, input mask',
           'Hybrid, encoder mask', 'Hybrid, random mask', 'MOMA, MoCo to MAE', 'MOMA, MAE to MoCo', 'MOMA, both']


def run(cell, seed, knn, grid='grid', nmi=0.1):
    """Six layers of two heads: the last third is the last two."""
    return dict(cell=cell, seed=seed, grid=grid, knn=knn, linear=knn + 1, finetune=knn + 2, nmi=[[nmi, nmi]] * 6,
                distance=[[4.0, 6.0]] * 6, gradient_ratio=0.5)


@pytest.fixture
def folder(tmp_path):
    """Results of a study in which method number i has k-NN 40 + i and 42 + i."""
    runs = {'random': dict(run('random weights', 0, 20.0, None), finetune_longer=33.0)}
    for index, name in enumerate(('supervised', 'moco', 'mae')):
        runs[f'teacher-{name}'] = run(name, 0, 50.0 + index, None)
    for index, cell in enumerate(METHODS):
        for seed in (0, 1):
            runs[f'grid-{index}-{seed}'] = run(cell, seed, 40.0 + index + 2 * seed)
    runs['sweep-a'] = run('kl 0.1', 0, 44.0, 'sweep')
    runs['sweep-b'] = run('smooth_l1 1.0', 0, 45.0, 'sweep')
    runs['cost'] = {cell: dict(ms=100.0 + index, mib=10.0) for index, cell in enumerate(METHODS)}
    runs['run'] = dict(date='2001-02-03', command='run', machine='an abacus', versions=dict(torch='0'), data='beads')
    folder = tmp_path / 'cpu'
    folder.mkdir()
    for name, content in runs.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return folder


def test_late__mean_of_heads_in_the_last_third():
    values = [[0.0], [0.0], [0.0], [0.0], [2.0, 4.0], [6.0, 8.0]]
    assert late(values) == 5.0
    assert late(values, layer=4) == 3.0
    assert late([[index] for index in range(12)]) == 9.5


def test_difference__spread_over_seeds_pooled_and_sampling_of_images():
    # Sample variances 2 and 8, pooled 5; of c, with one run, there is none of its own.
    results = Results({'a': [dict(knn=50.0), dict(knn=52.0)], 'b': [dict(knn=40.0), dict(knn=44.0)],
                       'c': [dict(knn=20.0)]}, {})
    assert results.spread('knn') == pytest.approx(5**0.5)
    value, error = results.difference(More('knn', 'a', 'b'))
    assert value == 9
    assert error == pytest.approx((5 / 2 + 5 / 2 + 51 * 49 / 10_000 + 42 * 58 / 10_000)**0.5)
    value, error = results.difference(More('knn', 'c', 'a'))
    assert value == -31
    assert error == pytest.approx((5 + 5 / 2 + 20 * 80 / 10_000 + 51 * 49 / 10_000)**0.5)


@pytest.mark.parametrize('value, expected', [
    (2.01, 'holds'), (1.99, 'not decided'), (-1.99, 'not decided'), (-2.01, 'does not hold')])
def test_verdict__two_errors_decide(value, expected):
    assert verdict(value, 1.0) == expected


def test_decide__margin_time_and_memory():
    results = Results({'a': [dict(knn=50.0), dict(knn=50.2)], 'b': [dict(knn=51.0), dict(knn=51.2)]},
                      dict(a=dict(ms=100, mib=10), b=dict(ms=96, mib=9)))
    assert decide(results, More('knn', 'a', 'b', margin=3.0))[0] == 'holds'
    assert decide(results, More('knn', 'a', 'b', margin=1.0))[0] == 'not decided'
    assert decide(results, More('ms', 'a', 'b')) == ('not decided', 'time, b / a: 0.96')
    assert decide(results, More('mib', 'a', 'b'))[0] == 'holds'
    assert decide(results, More('mib', 'b', 'a'))[0] == 'does not hold'


def test_judge__one_part_the_other_way_round_fails_the_claim():
    results = Results({'a': [dict(knn=60.0), dict(knn=60.0)], 'b': [dict(knn=50.0), dict(knn=50.0)],
                       'c': [dict(knn=60.5), dict(knn=60.5)]}, {})
    parts = {name: More('knn', *name) for name in ('ab', 'ba', 'ac')}
    assert judge(results, [parts['ab']])[0] == 'holds'
    assert judge(results, [parts['ab'], parts['ac']])[0] == 'not decided'
    verdict, measured = judge(results, [parts['ab'], parts['ac'], parts['ba']])
    assert verdict == 'does not hold'
    assert [text.split('(')[1] for text in measured] == ['holds)', 'not decided)', 'does not hold)']


def test_render__means_deviations_and_every_claim(folder):
    text = report.render(folder)
    rows = {row.split(' | ')[0].strip('| '): row for row in text.splitlines() if row.startswith('| ')}
    # FD: 40 and 42.
    assert rows['FD'] == ('| FD | 41.0 ± 1.4 | 42.0 ± 1.4 | 43.0 ± 1.4 | 0.100 ± 0.000 | 5.0 ± 0.0 | 100 | 10 |')
    assert rows['teacher: MAE'] == '| teacher: MAE | 52.0 | 53.0 | 54.0 | 0.100 | 5.0 |  |  |'
    assert rows['random weights, longer'] == '| random weights, longer |  |  | 33.0 |  |  |  |  |'
    # The cell of the grid with its first seed alone.
    assert rows['kl 0.3'] == '| kl 0.3 | 45.0 | 46.0 | 47.0 | 0.100 | 5.0 | 0.50 |'
    assert [row for row in rows if row.startswith(('kl', 'smooth'))] == ['kl 0.1', 'kl 0.3', 'smooth_l1 1.0']
    assert set(claims(6)) <= set(rows)
    assert 'an abacus' in text


def test_draw__both_figures(folder):
    report.draw(folder)
    for name in ('accuracy', 'layers'):
        with Image.open(folder / f'{name}.png') as image:
            assert image.width > 1000


@pytest.mark.parametrize('size', ['cpu', 'gpu'])
def test_readme__says_what_the_results_say(size):
    begin, end = report.marks(size)
    said = re.search(f'{begin}\n(.*?)\n{end}', (STUDY / 'README.md').read_text(), re.DOTALL)[1]
    folder = STUDY / 'results' / size
    if not folder.exists():
        assert said.startswith('Not run')
        return
    assert said == report.render(folder)
    for name in re.findall(r'\]\((results/\S+\.png)\)', said):
        assert (STUDY / name).exists()


def test_data__folders_of_numbered_images(tmp_path):
    class Two(list):
        classes = ['cat', 'dog']
    images = [Image.new('RGB', (32, 32), colour) for colour in ('red', 'green', 'blue')]
    data.write(Two(zip(images, (1, 0, 1))), tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.jpg')) == [
        'cat/0000.jpg', 'dog/0000.jpg', 'dog/0001.jpg']
    with Image.open(tmp_path / 'dog/0001.jpg') as image:
        red, green, blue = image.getpixel((16, 16))
        assert blue > 240 and red < 15 and green < 15


@pytest.mark.parametrize('words, message', [([], "not ''"), (['tpu'], "not 'tpu'"), (['gpu'], "of the size 'cpu'")])
def test_run__size_is_needed_and_not_mixed(tmp_path, words, message):
    (tmp_path / 'work_dirs').mkdir()
    (tmp_path / 'work_dirs/size').write_text('cpu\n')
    done = subprocess.run(['bash', str(STUDY / 'run.sh'), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
