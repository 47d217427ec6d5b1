"""Results of the study: how claims are decided, and that its README says what its results say."""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t as student_t

from studies.hybrid_on_cifar10 import data, report
from studies.hybrid_on_cifar10.claims import More, Results, claims, decide, judge, late, verdict
from tests.studies.test_hybrid_on_cifar10 import CELLS

STUDY = Path(__file__).parents[2] / 'studies/hybrid_on_cifar10'

METHODS = list(CELLS)
MADE_WITH = dict(date='2001-02-03', machine='an abacus', versions='beads 1.0', images='0123456789abcdef')


def bits(accuracy, start=0):
    """Of 1,000 images the ``accuracy`` percent from ``start`` on."""
    right = np.roll(np.arange(1000) < round(10 * accuracy), start)
    return np.packbits(right).tobytes().hex()


def run(cell, seed, knn, grid='grid', nmi=0.1, distance=5.0):
    """Six layers of two heads: the last third is the last two."""
    found = dict(knn=knn, knn_cls=knn - 3, linear=knn + 1, finetune=knn + 2)
    return dict(cell=cell, seed=seed, grid=grid, **found, nmi=[[nmi, nmi]] * 6,
                distance=[[distance - 1, distance + 1]] * 6, gradient_ratio=0.5,
                right={name: bits(value) for name, value in found.items()}, made_with=MADE_WITH)


@pytest.fixture
def folder(tmp_path):
    """Results of a study in which method number i has k-NN 40 + i and 42 + i."""
    runs = {'pixels': dict(cell='raw pixels', seed=0, grid=None, knn=19.0, linear=21.0, right={}, made_with=MADE_WITH)}
    for seed in (0, 1):
        random = run('random weights', seed, 20.0, None)
        longer = 33.0 + seed
        runs[f'random-{seed}'] = dict(
            random, finetune_longer=longer, right=dict(random['right'], finetune_longer=bits(longer)))
    for index, name in enumerate(report.TEACHERS):
        runs[f'teacher-{name}'] = run(name, 0, 50.0 + index, None)
    for index, cell in enumerate(METHODS):
        for seed in (0, 1):
            runs[f'grid-{index}-{seed}'] = run(cell, seed, 40.0 + index + 2 * seed)
    runs['sweep-a'] = run('kl 0.1', 0, 44.0, 'sweep')
    runs['sweep-b'] = run('smooth_l1 1.0', 0, 45.0, 'sweep')
    runs['cost'] = dict(made_with=MADE_WITH, cells={
        cell: dict(ms=[100.0 + index, 90.0, 120.0], mib=[10.0, 10.0, 10.0]) for index, cell in enumerate(METHODS)})
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


def test_difference__spread_over_seeds_and_sampling_of_the_same_images():
    # Sample variances 2 and 8 of accuracies, pooled 5; of c, with one run, there is none of its own.
    results = Results({'a': [run('a', 0, 50.0), run('a', 1, 52.0)], 'b': [run('b', 0, 40.0), run('b', 1, 44.0)],
                       'c': [run('c', 0, 20.0)]}, {})
    assert results.spread('knn') == (pytest.approx(5**0.5), 2)
    # What has no such measure tells nothing of it.
    results.runs['d'] = [dict(seed=seed, finetune=50.0 + 9 * seed) for seed in (0, 1)]
    assert results.spread('knn') == (pytest.approx(5**0.5), 2)
    value, error, freedom = results.difference(More('knn', 'a', 'b'))
    # Of 1,000 images the first 400 count nothing; of the next 40 one seed of b is wrong, of 60 both, of 20 one of a.
    differences = np.repeat([0.0, 50.0, 100.0, 50.0, 0.0], [400, 40, 60, 20, 480])
    assert (value, freedom) == (9, 2)
    assert error == pytest.approx((5 / 2 + 5 / 2 + differences.var(ddof=1) / 1000)**0.5)
    value, error, _ = results.difference(More('knn', 'c', 'a'))
    differences = np.repeat([0.0, -100.0, -50.0, 0.0], [200, 300, 20, 480])
    assert value == -31
    assert error == pytest.approx((5 + 5 / 2 + differences.var(ddof=1) / 1000)**0.5)


def test_difference__of_nmi_is_relative():
    # Ten times the NMI, and the spread that goes with it; logarithms differ by log 1.5 and log 2.
    results = Results({'a': [run('a', seed, 1.0, nmi=nmi) for seed, nmi in enumerate((0.4, 0.6))],
                       'b': [run('b', seed, 1.0, nmi=nmi) for seed, nmi in enumerate((0.02, 0.04))]}, {})
    deviation = ((np.log(1.5)**2 / 2 + np.log(2)**2 / 2) / 2)**0.5
    assert results.spread('nmi') == (pytest.approx(deviation), 2)
    value, error, _ = results.difference(More('nmi', 'a', 'b'))
    assert value == pytest.approx(np.log(0.4 * 0.6 / (0.02 * 0.04)) / 2)
    assert error == pytest.approx(deviation)
    assert decide(results, More('nmi', 'a', 'b'))[1] == f'NMI, a / b: {np.exp(value):.2f}, log +2.85 ± {error:.2f}'


@pytest.mark.parametrize('value, expected', [
    (2.01, 'holds'), (1.99, 'not decided'), (-2.99, 'not decided'), (-3.01, 'does not hold')])
def test_verdict__bounds(value, expected):
    assert verdict(value, 2.0, 3.0) == expected


def pair(difference, spread=0.1):
    """Results in which a is better than b by ``difference``, on images that both classify alike but for it."""
    return Results({'a': [run('a', 0, 50.0 + difference - spread), run('a', 1, 50.0 + difference + spread)],
                    'b': [run('b', 0, 50.0 - spread), run('b', 1, 50.0 + spread)]},
                   dict(a=dict(ms=[100, 99, 110], mib=[10, 12, 11]), b=dict(ms=[96, 90, 99.5], mib=[9, 8, 9.9])))


def test_decide__by_the_quantile_of_its_degrees_of_freedom():
    claim = More('knn', 'a', 'b')
    for difference in (0.5, 1.0, 1.5, 2.0):
        results = pair(difference)
        value, error, freedom = results.difference(claim)
        assert freedom == 2
        # 4.3 standard errors, not 2: a spread of two cells is little known.
        assert student_t.ppf(0.975, 2) == pytest.approx(4.303, abs=1e-3)
        assert (decide(results, claim)[0] == 'holds') == (value > 4.303 * error)
        # Among 12 comparisons one is the other way round at a twelfth of the level.
        turned = More('knn', 'b', 'a')
        assert (decide(results, turned)[0] == 'does not hold') == (value > 4.303 * error)
        assert (decide(results, turned, 12)[0] == 'does not hold') == (
            value > student_t.ppf(1 - 0.025 / 12, 2) * error)
    assert decide(pair(0.5), claim)[0] == 'not decided' and decide(pair(2.0), claim)[0] == 'holds'


def test_decide__margin_time_and_memory():
    assert decide(pair(0.0), More('knn', 'a', 'b'))[0] == 'not decided'
    assert decide(pair(0.0), More('knn', 'a', 'b', margin=1.0))[0] == 'holds'
    assert decide(pair(-1.0), More('knn', 'a', 'b', margin=1.0))[0] == 'not decided'
    results = pair(0.0)
    # The slowest round of b is slower than the fastest of a.
    assert decide(results, More('ms', 'a', 'b')) == ('not decided', 'time, b / a: 96 / 100')
    assert decide(results, More('ms', 'b', 'a'))[0] == 'not decided'
    assert decide(results, More('mib', 'a', 'b'))[0] == 'holds'
    assert decide(results, More('mib', 'b', 'a'))[0] == 'does not hold'


def test_judge__one_part_the_other_way_round_fails_the_claim():
    parts = [More('knn', 'a', 'b'), More('linear', 'a', 'b'), More('knn', 'b', 'a')]
    assert judge(pair(20.0), parts[:2])[0] == 'holds'
    assert judge(pair(0.1), parts[:2])[0] == 'not decided'
    verdict, measured = judge(pair(20.0), parts)
    assert verdict == 'does not hold'
    assert [text.rpartition('(')[2] for text in measured] == ['holds)', 'holds)', 'does not hold)']


# What the papers say, as numbers: cell -> accuracy, NMI, distance.
SAID = {
    'raw pixels': (20, 0.1, 5), 'random weights': (20, 0.1, 5), 'supervised': (70, 0.02, 9), 'moco': (69, 0.01, 9),
    'mae': (50, 0.3, 3), 'mae_longer': (50, 0.3, 3), 'moco_longer': (69, 0.01, 9), 'FD': (70, 0.02, 9),
    'FD, 75 % masked': (68, 0.02, 9), 'FD of MoCo': (69, 0.01, 9), 'relations': (45, 0.3, 3),
    'MFR, depth 1': (64, 0.05, 8), 'MFR, depth 8': (60, 0.1, 7), 'Hybrid, no mask': (76, 0.2, 5),
    'Hybrid of MoCo, no mask': (75, 0.2, 5), 'Hybrid, input mask': (82, 0.2, 5), 'Hybrid, one stage': (78, 0.2, 5),
    'Hybrid, encoder mask': (80, 0.2, 5), 'Hybrid, random mask': (78, 0.2, 5), 'MOMA, MoCo to MAE': (72, 0.1, 6),
    'MOMA, MAE to MoCo': (72, 0.1, 6), 'MOMA, both': (71, 0.1, 6)}


@pytest.mark.parametrize('sign, expected', [(1, 'holds'), (-1, 'does not hold')])
def test_claims__are_what_the_papers_say(sign, expected):
    def mirrored(value, low, high):
        return value if sign == 1 else low + high - value
    runs = {}
    for cell, (accuracy, nmi, distance) in SAID.items():
        accuracy, distance = mirrored(accuracy, 20, 82), mirrored(distance, 3, 9)
        nmi = nmi if sign == 1 else 0.003 / nmi
        runs[cell] = [run(cell, seed, accuracy + 0.1 * seed, nmi=nmi * (1 + 0.01 * seed), distance=distance)
                      for seed in ((0, 1) if cell in (*METHODS, 'random weights') else (0, ))]
    runs['random weights, longer'] = [
        dict(each, finetune=each['finetune'] + sign, right=dict(each['right'], finetune=bits(each['finetune'] + sign)))
        for each in runs['random weights']]
    def rounds(value):
        return dict(ms=[value - 1, value, value + 1], mib=[value - 2, value, value + 2])
    costs = {cell: rounds(mirrored(100, 30, 100)) for cell in METHODS}
    for cell in METHODS:
        if cell.startswith('MOMA') or cell == 'Hybrid, input mask':
            costs[cell] = rounds(mirrored(30, 30, 100))
    results = Results(runs, costs)
    for claim, parts in claims(6).items():
        assert judge(results, parts)[0] == expected, claim
        if sign == -1:
            # Every comparison is turned round, not one of them alone.
            assert all(decide(results, part)[0] == 'does not hold' for part in parts), claim


def test_render__means_deviations_and_every_claim(folder):
    text = report.render(folder)
    rows = {row.split(' | ')[0].strip('| '): row for row in text.splitlines() if row.startswith('| ')}
    # FD: 40 and 42.
    assert rows['FD'] == (
        '| FD | 41.0 ± 1.4 | 38.0 ± 1.4 | 42.0 ± 1.4 | 43.0 ± 1.4 | 0.100 ± 0.000 | 5.0 ± 0.0 | 100 (90 to 120) '
        '| 10 (10 to 10) |')
    assert rows['teacher: MAE'] == '| teacher: MAE | 52.0 | 49.0 | 53.0 | 54.0 | 0.100 | 5.0 |  |  |'
    assert rows['raw pixels'] == '| raw pixels | 19.0 |  | 21.0 |  |  |  |  |  |'
    assert rows['random weights, longer'] == '| random weights, longer |  |  |  | 33.5 ± 0.7 |  |  |  |  |'
    # The cell of the grid with its first seed alone.
    knn = 40.0 + METHODS.index('Hybrid, input mask')
    assert rows['kl 0.3'] == f'| kl 0.3 | {knn} | {knn - 3} | {knn + 1} | {knn + 2} | 0.100 | 5.0 | 0.50 |'
    assert [row for row in rows if row.startswith(('kl', 'smooth'))] == ['kl 0.1', 'kl 0.3', 'smooth_l1 1.0']
    assert set(claims(6)) <= set(rows)
    assert 'an abacus' in text


def test_main__results_of_this_run_replace_the_published_ones(folder, tmp_path, monkeypatch):
    study = tmp_path / 'study'
    begin, end = report.marks('cpu')
    (study / 'results/cpu').mkdir(parents=True)
    (study / 'results/cpu/old.json').write_text('{}')
    (study / 'README.md').write_text(f'before\n{begin}\nnothing\n{end}\nafter\n')
    monkeypatch.setattr(report, 'HERE', study)
    monkeypatch.setattr('sys.argv', ['report.py', 'cpu'])
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'work_dirs/results').mkdir(parents=True)
    unfinished = tmp_path / 'work_dirs/results/cpu'
    folder.rename(unfinished)
    (unfinished / 'cost.json').rename(tmp_path / 'cost.json')
    with pytest.raises(SystemExit, match='not finished, it has no cost.json'):
        report.main()
    assert (study / 'results/cpu/old.json').exists()
    (tmp_path / 'cost.json').rename(unfinished / 'cost.json')
    report.main()
    names = {path.name for path in unfinished.iterdir()}
    assert {path.name for path in (study / 'results/cpu').iterdir()} == {*names, 'accuracy.png', 'layers.png'}
    text = (study / 'README.md').read_text()
    assert text == f'before\n{begin}\n{report.render(unfinished)}\n{end}\nafter\n'
    # Without a run those that are there are told anew.
    shutil.rmtree(unfinished)
    (study / 'README.md').write_text(f'before\n{begin}\nnothing\n{end}\nafter\n')
    report.main()
    assert (study / 'README.md').read_text() == text


def test_draw__both_figures(folder):
    report.draw(folder)
    for name in ('accuracy', 'layers'):
        with Image.open(folder / f'{name}.png') as image:
            assert image.width > 1000
            assert image.text['results'] == report.digest(folder)
    (folder / 'pixels.json').write_text((folder / 'pixels.json').read_text().replace('19.0', '19.1'))
    assert image.text['results'] != report.digest(folder)


@pytest.mark.parametrize('size', ['cpu', 'gpu'])
def test_readme__says_what_the_results_say(size):
    begin, end = report.marks(size)
    said = re.search(f'{begin}\n(.*?)\n{end}', (STUDY / 'README.md').read_text(), re.DOTALL)[1]
    folder = STUDY / 'results' / size
    if not folder.exists():
        assert said.startswith('Not run')
        return
    assert said == report.render(folder)
    figures = re.findall(r'\]\((results/\S+\.png)\)', said)
    assert len(figures) == 2
    for name in figures:
        with Image.open(STUDY / name) as image:
            assert image.text['results'] == report.digest(folder)


@pytest.mark.parametrize('size, seeds', [('cpu', {0, 1}), ('gpu', {0, 1, 2})])
def test_results__of_every_model_with_the_same_images(size, seeds):
    folder = STUDY / 'results' / size
    if not folder.exists():
        assert size == 'gpu'
        return
    results, sweep, made_with = report.load(folder)
    assert len({made['images'] for made in made_with}) == 1
    assert set(results.costs) == set(METHODS)
    for cell in (*METHODS, 'random weights'):
        assert sorted(run['seed'] for run in results.runs[cell]) == sorted(seeds), cell
    assert set(report.TEACHERS) | {'raw pixels'} <= set(results.runs)
    assert len(sweep) == 6


def test_project_readme__tells_the_verdicts():
    results, _, _ = report.load(STUDY / 'results/cpu')
    text = ' '.join((STUDY.parents[1] / 'README.md').read_text().split())
    section = text[text.index('## Is it hybrid?'):]
    said = re.findall(r'\*([^*]+)\*: (holds|does not hold|not decided)', section[:section.index(' ## ', 1)])
    decided = {claim.removesuffix(' [ours]'): judge(results, parts)[0] for claim, parts in claims(6).items()}
    said = [(claim.replace('And', 'and', 1), verdict) for claim, verdict in said]
    assert 'Eleven of its twenty verdicts' in section and (len(said), len(decided)) == (11, 20)
    assert all(decided[claim] == verdict for claim, verdict in said)
    # No claim that fails is left out.
    assert {claim for claim, verdict in decided.items() if verdict == 'does not hold'} <= dict(said).keys()
    for cell in ('Hybrid, input mask', 'FD, 75 % masked', 'Hybrid of MoCo, no mask', 'FD of MoCo'):
        assert f'{sum(results.values(cell, "finetune")) / 2:.1f} %' in section


def test_data__folders_of_numbered_images(tmp_path):
    class Two(list):
        classes = ['cat', 'dog']
    images = [Image.new('RGB', (32, 32), colour) for colour in ('red', 'green', 'blue')]
    # One that was ended in the middle does not count.
    with pytest.raises(AttributeError):
        data.write(Two(zip([images[0], None], (1, 0))), tmp_path / 'train')
    assert not (tmp_path / 'train').exists()
    data.write(Two(zip(images, (1, 0, 1))), tmp_path / 'train')
    folder = tmp_path / 'train'
    assert sorted(str(path.relative_to(folder)) for path in tmp_path.rglob('*.jpg')) == [
        'cat/0000.jpg', 'dog/0000.jpg', 'dog/0001.jpg']
    # What is there is left alone.
    data.write(Two(), folder)
    with Image.open(folder / 'dog/0001.jpg') as image:
        red, green, blue = image.getpixel((16, 16))
        assert blue > 240 and red < 15 and green < 15


@pytest.mark.parametrize('words, message', [([], "not ''"), (['tpu'], "not 'tpu'"), (['gpu'], "of the size 'cpu'")])
def test_run__size_is_needed_and_not_mixed(tmp_path, words, message):
    (tmp_path / 'work_dirs').mkdir()
    (tmp_path / 'work_dirs/size').write_text('cpu\n')
    done = subprocess.run(['bash', str(STUDY / 'run.sh'), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def steps(tmp_path):
    """Runs run.sh with a python that only tells what it was asked for, and fails at ``$FAILS``."""
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env bash\n'
                      '[[ $1 == -c ]] && exit 0\n'
                      'words=("${@##*/}"); echo "${words[*]}" >> called\n'
                      '[[ $* == *data.py* ]] && mkdir -p data/cifar10/{train,test}\n'
                      '[[ $* == *train.py* ]] && mkdir -p "$4"\n'
                      '[[ -z ${FAILS:-} || $* != *$FAILS* ]]\n')
    python.chmod(0o755)

    def run(fails=''):
        (tmp_path / 'called').unlink(missing_ok=True)
        done = subprocess.run(['bash', str(STUDY / 'run.sh'), 'cpu'], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, 'PYTHON': str(python), 'FAILS': fails, 'JOBS': '3'})
        return done.returncode, (tmp_path / 'called').read_text().splitlines()
    return run


def test_run__every_step_once_in_order(steps, tmp_path):
    def train(name, *words):
        return ' '.join(('train.py', f'{name}.py', '--work-dir', name, *words))
    sweep = 'ablate.py sweep.py --out sweep --jobs 2'
    after = [sweep, 'ablate.py grid.py --out grid --jobs 3', 'measure.py cpu --jobs 3', 'cost.py cpu', 'report.py cpu']
    moco, others = map(train, ('moco', 'moco_longer')), map(train, ('supervised', 'mae', 'mae_longer'))
    moco, others = list(moco), list(others)
    # Ended in the second teacher, which goes on from its checkpoint; MoCo trains meanwhile.
    code, called = steps(fails='/mae.py')
    assert code == 1 and called[0] == 'data.py cifar10'
    assert [call for call in called[1:] if call not in moco] == others[:2]
    for name in ('moco', 'moco_longer'):
        (tmp_path / f'work_dirs/{name}/finished').unlink(missing_ok=True)
    (tmp_path / 'work_dirs/mae/last_checkpoint').touch()
    code, called = steps()
    assert code == 0
    assert [call for call in called if call in moco] == moco
    assert [call for call in called if call not in moco] == [train('mae', '--resume'), others[2], *after]
    # The grid waits for MoCo.
    assert called.index(moco[1]) < called.index(after[1])
    # All is there; what looks for itself is asked.
    assert steps() == (0, after)


def test_run__grid_waits_for_moco_and_fails_with_it(steps):
    code, called = steps(fails='/moco.py')
    assert code == 1
    assert not any('grid' in call or 'moco_longer' in call for call in called)
