import html
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmhdistill.analysis import compare_figures
from mmhdistill.analysis.compare import (
    attention_map,
    cka_matrices,
    compare,
    keep_rates,
    kept_tokens,
    read_images,
    resized,
    run,
)
from mmhdistill.analysis.diversity import diversity_taps
from mmhdistill.analysis.zoo import Model, load_model
from mmhdistill.functional import (
    attention_distance,
    attention_from_qk,
    attention_nmi,
    effective_rank,
    fourier_log_amplitude,
    linear_cka,
)
from mmhdistill.models.taps import ViTOutput, ViTSpec
from mmhdistill.registry import MODELS
from tests.helpers import write_images

ROOT = Path(__file__).parents[2]
QUICKSTART = 'mmhdistill::quickstart/hdistill_vit-photos.py'


def test_run__is_what_the_functions_say_of_all_images_at_once(checkpoint, images):
    model = load_model(str(checkpoint[0]))
    output, found = run(model, images)
    whole = model.run(images, diversity_taps(model.spec))
    assert len(images) == 3
    for layer in range(3):
        # One image at a time or all, up to rounding; queries and keys of the images that are drawn alone.
        torch.testing.assert_close(output.taps[layer, 'hidden'], whole.taps[layer, 'hidden'])
        for kind in 'qk':
            torch.testing.assert_close(output.taps[layer, kind], whole.taps[layer, kind][:2])
        attention = attention_from_qk(whole.taps[layer, 'q'], whole.taps[layer, 'k'], 4, 1)
        assert found['nmi'][layer] == pytest.approx(attention_nmi(attention).tolist(), rel=1e-4)
        assert found['distance'][layer] == pytest.approx(attention_distance(attention, (4, 4), 8).tolist(), rel=1e-5)
        tokens = whole.taps[layer, 'hidden'][:, 1:].reshape(48, 32)
        assert found['rank'][layer] == pytest.approx(effective_rank(tokens).item(), rel=1e-5)
        maps = tokens.view(3, 4, 4, 32).permute(0, 3, 1, 2)
        assert found['fourier'][layer] == pytest.approx(fourier_log_amplitude(maps).tolist(), abs=1e-4)
    assert (found['image_size'], found['patch_size'], found['heads']) == (32, 8, 4)


def test_run__at_the_size_that_a_model_was_made_for(checkpoint, images):
    model = load_model(str(checkpoint[0]))
    larger = resized(images, 72)
    output, found = run(model, larger)
    assert (output.grid, found['image_size']) == ((4, 4), 32)
    assert found['distance'] == run(model, resized(larger, 32))[1]['distance']


def test_run__queries_and_keys_of_few_images_lie_in_memory(checkpoint, images):
    model, seen = load_model(str(checkpoint[0])), []
    inner = model.run
    model.run = lambda part, taps: seen.append(len(part)) or inner(part, taps)
    run(model, images.repeat(3, 1, 1, 1))
    assert seen == [2, 2, 2, 2, 1]


def test_cka__of_a_model_with_itself_and_of_two_grids(checkpoint, images):
    one, other = load_model(str(checkpoint[0])), load_model(QUICKSTART)
    outputs = {one.name: run(one, images)[0], other.name: run(other, images)[0]}
    matrices = cka_matrices([one, other], outputs)
    assert {pair: tuple(matrix.shape) for pair, matrix in matrices.items()} == {
        (one.name, one.name): (3, 3), (one.name, other.name): (3, 4), (other.name, other.name): (4, 4)}
    for name in (one.name, other.name):
        assert matrices[name, name].diagonal().tolist() == pytest.approx([1.0] * len(matrices[name, name]))
        assert torch.allclose(matrices[name, name], matrices[name, name].T)
    assert 0 < matrices[one.name, other.name].max() < 0.99
    # On the coarser grid, whichever comes first.
    assert (outputs[one.name].grid, outputs[other.name].grid) == ((4, 4), (8, 8))
    swapped = cka_matrices([other, one], outputs)
    torch.testing.assert_close(swapped[other.name, one.name], matrices[one.name, other.name].T)
    coarse, fine = outputs[one.name].patches(2, 'hidden'), outputs[other.name].patches(0, 'hidden', grid=(4, 4))
    want = linear_cka(coarse.flatten(0, 1), fine.flatten(0, 1))
    assert matrices[one.name, other.name][2, 0].item() == pytest.approx(want.item(), rel=1e-5)
    own = outputs[other.name]
    want = linear_cka(*(own.patches(layer, 'hidden').flatten(0, 1) for layer in (0, 3)))
    assert swapped[other.name, other.name][0, 3].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize('query, row, column', [((0, 0), 0, 0), ((0.5, 0.75), 2, 3), ((1, 1), 3, 3)])
def test_attention_map__of_a_model_that_looks_at_itself(query, row, column):
    """Token i has channel i alone; the class token has none."""
    sharp = torch.cat([torch.zeros(1, 16), 100 * torch.eye(16)]).unsqueeze(0)
    output = ViTOutput({(1, 'q'): sharp, (1, 'k'): sharp}, 1, (4, 4))
    model = Model('sharp', ViTSpec(embed_dims=16, depth=2, num_heads=1, patch_size=8), 32, None)
    looks = attention_map(model, output, 0, query, 1.0)
    assert looks.shape == (4, 4) and looks.sum().item() == pytest.approx(1)
    assert looks[row, column].item() == pytest.approx(1)


def test_kept_tokens__fall_by_stage_and_by_time_of_a_ramp(images):
    owner, teacher = load_model(QUICKSTART), load_model(f'mae:{QUICKSTART}')
    how, rates, strips = kept_tokens([owner, teacher], owner, images)
    assert how == 'scored by mae' and rates == {0.7: 'throughout'}
    assert [int(mask.sum()) for mask in strips[0]] == [3 * 45, 3 * 31, 3 * 22]
    for less, more in zip(strips[0][1:], strips[0]):
        assert (less <= more).all()
    owner.settings['custom_hooks'] = [dict(type='mmhdistill.RedundantTokenMasker', schedule='linear', start=1.0)]
    how, rates, strips = kept_tokens([owner, teacher], owner, images)
    assert list(rates) == pytest.approx([1.0, 0.925, 0.85, 0.775, 0.7])
    assert strips[0][-1].all() and int(strips[-1][-1].sum()) == 3 * 22


@pytest.mark.parametrize('training, hook, expected', [
    (dict(max_epochs=100), dict(schedule='linear'),
     {1.0: 'epoch 0', 0.9: 'epoch 25', 0.8: 'epoch 50', 0.7: 'epoch 75', 0.6: 'epoch 100'}),
    # Moves from epoch 25 to 75 alone, to a rate of its own.
    (dict(max_epochs=100), dict(schedule='linear', begin=25, end=75, keep_rate=0.5, start=0.9),
     {0.9: 'epoch 0', 0.7: 'epoch 50', 0.5: 'epoch 75'}),
    (dict(by_epoch=False, max_iters=80), dict(schedule='linear', begin=40, by_epoch=False),
     {1.0: 'iteration 0', 0.8: 'iteration 60', 0.6: 'iteration 80'}),
    # The whole of training, in whatever unit.
    (dict(max_epochs=2), dict(schedule='linear', by_epoch=False),
     {1.0: 'epoch 0', 0.9: 'epoch 0.5', 0.8: 'epoch 1', 0.7: 'epoch 1.5', 0.6: 'epoch 2'}),
    # How many iterations an epoch has is not told.
    (dict(max_epochs=2), dict(schedule='linear', end=500, by_epoch=False),
     {1.0: '0% of the ramp', 0.9: '25% of the ramp', 0.8: '50% of the ramp', 0.7: '75% of the ramp',
      0.6: '100% of the ramp'}),
    (dict(max_epochs=100), dict(schedule='constant'), {0.6: 'throughout'}),
    (None, dict(schedule='constant'), {0.6: 'throughout'})])
def test_keep_rates__by_time_of_training(training, hook, expected):
    settings = dict(train_cfg=training, custom_hooks=[dict(type='mmhdistill.RedundantTokenMasker', **hook)])
    found = keep_rates(settings, 0.6)
    assert list(found.values()) == list(expected.values())
    assert list(found) == pytest.approx(list(expected))


@pytest.mark.parametrize('patch, grid', [(4, 8), (8, 4)])
def test_kept_tokens__are_those_of_training(patch, grid, images):
    """Scored by a teacher of another patch size, or inside the student, as the distiller would."""
    size = grid * patch
    seen = resized(images, size)
    owner = load_model(QUICKSTART)
    teacher = Model('mae', owner.spec, 32, lambda x, taps: owner.run(resized(x, 4 * grid), taps))
    teacher.spec = ViTSpec(64, 4, 4, patch)
    owner.image_size = 4 * grid
    masker = MODELS.build(owner.settings['model']['masker'])
    masker.bind(teacher.spec)
    everything = torch.arange(grid**2).expand(3, -1)
    want = masker.select(everything, masker.counts(grid**2), teacher.run(seen, masker.taps))
    _, _, strips = kept_tokens([owner, teacher], owner, images)
    assert torch.equal(strips[0][-1].flatten(1).nonzero()[:, 1].view(3, -1), want.sort().values)


def test_kept_tokens__inside_the_student(images):
    owner = load_model(QUICKSTART)
    owner.settings['model']['masker'].update(place='encoder', teacher=None)
    how, rates, strips = kept_tokens([load_model(f'mae:{QUICKSTART}'), owner], owner, images)
    assert how == 'scored by hdistill_vit-photos' and list(rates) == [0.7]
    masker = MODELS.build(owner.settings['model']['masker'])
    masker.bind(owner.spec)
    output = owner.run(images, {3: frozenset({'hidden'})} | masker.taps, masker.reducer(3, 64, images.device, None))
    assert strips[0][0].all()
    for mask, layer, count in zip(strips[0][1:], (1, 2), (45, 31)):
        assert torch.equal(mask.flatten(1).nonzero()[:, 1].view(3, count), output.keep_ids[layer].sort().values)


def test_kept_tokens__of_another_scorer_are_not_shown(images):
    owner = load_model(QUICKSTART)
    with pytest.raises(ValueError, match=r"teacher 'mae', which is none of .*: add it, as mae:MODEL"):
        kept_tokens([owner, load_model(f'maestro:{QUICKSTART}')], owner, images)
    owner.settings['model']['teachers'] = dict(mae=dict(card=dict(name='my mae')))
    assert kept_tokens([owner, load_model(f'my mae:{QUICKSTART}')], owner, images)[0] == 'scored by my mae'


def test_kept_tokens__of_a_random_masker(images):
    owner = load_model('mmhdistill::quickstart/moma_moco-mae_vit-photos.py')
    state = torch.get_rng_state()
    how, rates, strips = kept_tokens([owner], owner, images)
    assert how == 'drawn at random' and list(rates) == [0.1] and [int(mask.sum()) for mask in strips[0]] == [3 * 6]
    owner.settings['model']['masker'].update(num_stages=2, keep_rate=0.5)
    first, second = kept_tokens([owner], owner, images)[2][0]
    assert (second <= first).all() and torch.equal(torch.get_rng_state(), state)


def test_read_images__middle_squares_evenly_over_the_folder(tmp_path):
    from mmcv import imwrite
    for index in range(5):
        image = torch.zeros(20, 40, 3).byte()
        image[:, 10:30, 2] = 50 * index  # red, in BGR
        image[:, :10, 0] = 255
        imwrite(image.numpy(), str(tmp_path / f'{index}.png'))
    read, notes = read_images(tmp_path, 3, 10)
    assert notes == []
    assert read.shape == (3, 3, 10, 10)
    for image, red in zip(read, (0, 100, 200)):
        assert image[0].flatten().tolist() == pytest.approx([red] * 100, abs=0.1)
        assert not image[1:].any()


def grey_images(folder, names):
    """Each of one grey, 10 times its place in ``names``, as JPEG or PNG."""
    for index, name in enumerate(names):
        Image.new('L', (16, 16), 10 * index).save(folder / name)


@pytest.mark.parametrize('number, expected', [
    (7, [10, 20, 40, 60]),  # all that can be used
    (1, [10]),
    (2, [10, 60]),
    (4, [10, 20, 40, 60]),  # of 0, 2, 4, 6, to which 1 and 2, 4, 6 are next
    (3, [10, 40, 60]),  # of 0, 3, 6
])
def test_read_images__the_next_stands_in_for_one_that_cannot_be_used(number, expected, tmp_path):
    grey_images(tmp_path, ['0.jpg', '1.png', '2.png', '3.png', '4.png', '5.jpg', '6.png'])
    (tmp_path / '0.jpg').write_text('a text')
    (tmp_path / '3.png').write_bytes((tmp_path / '3.png').read_bytes()[:60])
    (tmp_path / '5.jpg').write_bytes((tmp_path / '6.png').read_bytes()[:40])
    read, notes = read_images(tmp_path, number, 16)
    assert read.mean(dim=(1, 2, 3)).tolist() == pytest.approx(expected)
    count = {7: '3 images that cannot be used were', 3: '2 images that cannot be used were'}.get(
        number, '1 image that cannot be used was')
    assert notes == [f'{count} left out, for example {tmp_path}/0.jpg (not an image: its content is of no known image '
                     'format).']


def test_read_images__after_the_last_comes_the_first(tmp_path):
    grey_images(tmp_path, ['0.png', '1.png', '2.png', '3.png'])
    (tmp_path / '0.png').write_bytes(b'')
    (tmp_path / '3.png').write_bytes((tmp_path / '3.png').read_bytes()[:50])
    read, notes = read_images(tmp_path, 2, 16)
    assert read.mean(dim=(1, 2, 3)).tolist() == pytest.approx([10, 20])
    assert notes[0].startswith(f'2 images that cannot be used were left out, for example {tmp_path}/0.png (empty: ')


def test_read_images__none_can_be_used(tmp_path):
    (tmp_path / '0.png').write_bytes(b'no image')
    (tmp_path / '1.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r"no image of '.*' can be used, for example .*0.png \(not an ima"):
        read_images(tmp_path, 1, 8)


def test_compare__page_holds_everything(checkpoint, images, tmp_path):
    """Names that are words of the report, of HTML or of TeX, or that legends leave out."""
    names = ['cka', '<random> $_{', '_']
    models = [load_model(f'cka:{checkpoint[0]}'), load_model(f'<random> $_{{:{QUICKSTART}'),
              load_model(f'_:{QUICKSTART}')]
    models[2].settings['model']['masker'].update(place='encoder', teacher=None)
    report = compare(models, images, tmp_path, notes=['1 image < 2'])
    assert json.loads((tmp_path / 'report.json').read_text()) == report
    assert sorted(path.name for path in tmp_path.glob('*.png')) == [
        'attention.png', 'cka.png', 'diversity.png', 'fourier.png', 'kept-4.png']
    text = (tmp_path / 'report.html').read_text()
    assert f'; {len(images)} images</p>' in text
    assert text.count('<img') == text.count('src="data:image/png;base64,') == 5
    # At one size of text: 150 pixels an inch.
    assert [int(width) for width in re.findall('<img [^>]*width="([0-9]+)"', text)] == [1012, 1012, 1012, 1012, 570]
    assert 'http' not in re.sub(r'base64,[^"]*', '', text) and '&lt;random&gt;' in text and '<random>' not in text
    given, note = report['notes']
    assert given == '1 image < 2' and '<p>1 image &lt; 2</p>' in text
    assert note.startswith('What the masker of <random> $_{ leaves is not drawn:') and html.escape(note) in text
    assert list(report['models']) == names and len(report['cka']) == 6
    for name in names:
        found = report['models'][name]
        for layer in range(len(found['nmi'])):
            nmi, distance = (sum(found[key][layer]) / len(found[key][layer]) for key in ('nmi', 'distance'))
            assert (f'<tr><td>{html.escape(name)}, 32 px</td><td>{layer}</td><td>{nmi:.4f}</td><td>{distance:.4f}</td>'
                    f'<td>{found["rank"][layer]:.4f}</td></tr>') in text


def test_resized__same_size_is_untouched(images):
    assert resized(images, 32) is images
    small = resized(images, 16)
    assert small.shape == (3, 3, 16, 16) and small.min() >= 0 and small.max() <= 255


@pytest.mark.slow
def test_tool__writes_a_report_and_never_over_one(checkpoint, tmp_path):
    write_images(tmp_path / 'images', [f'{index}.png' for index in range(4)], size=40)
    command = [sys.executable, ROOT / 'tools/analysis/compare.py', f'mine:{checkpoint[0]}', f'start:{QUICKSTART}',
               '--images', tmp_path / 'images', '--num-images', '2', '--out', tmp_path / 'out']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / 'out/report.html').stat().st_size > 100_000
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and 'holds files already: give another --out' in again.stderr
    command[-1] = tmp_path / 'other'
    command[3] = f'mine:{QUICKSTART}'
    twice = subprocess.run(command, capture_output=True, text=True)
    assert twice.returncode == 2 and "two models have one name in ['mine', 'mine']" in twice.stderr


@pytest.mark.parametrize('words, error', [
    (['--num-images', '0'], '--num-images is 0: give 1 or more'),
    (['--size', '-4'], '--size is -4: give 1 or more'),
    (['--size', '30'], 'images of 30 pixels cannot be cut into the patches of start: give --size a multiple of 4'),
    (['--size', '4'], 'images of 4 pixels cannot be cut into the patches of start: give --size a multiple of 4, at le'),
    (['--out', 'file'], 'file is a file: give --out a folder'),
    (['--images', 'damaged'], "no image of 'damaged' can be used, for example damaged/0.jpg (empty: "),
    (['--images', 'none'], "no image found in 'none/'"),
    (['--queries', '0.5'], "argument --queries: '0.5' is no place in an image: give Y,X, shares of its height and "),
    (['--queries', '0.5,0.5', '1.5,0.5'], "argument --queries: '1.5,0.5' is no place"),
    (['--queries=0.5,-0.1'], "argument --queries: '0.5,-0.1' is no place"),
    (['--queries', '0.5,nan'], "argument --queries: '0.5,nan' is no place"),
    (['--queries', '0.1,0.2,0.3'], "argument --queries: '0.1,0.2,0.3' is no place"),
    (['--queries', 'left'], "argument --queries: 'left' is no place"),
    (['--layers', '0'], "argument --layers: '0' is no share of the depth: give more than 0 and at most 1"),
    (['--layers', '0.5', '12'], "argument --layers: '12' is no share of the depth"),
    (['--layers', '-1'], "argument --layers: '-1' is no share of the depth"),
    (['--layers', 'nan'], "argument --layers: 'nan' is no share of the depth"),
    (['--layers', 'last'], "argument --layers: 'last' is no share of the depth"),
])
def test_tool__refuses(words, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged/0.jpg').write_bytes(b'')
    write_images(tmp_path / 'images', ['0.png'], size=40)
    monkeypatch.setattr(sys, 'argv', [
        'compare.py', f'start:{QUICKSTART}', '--images', 'images', '--out', 'out', *words])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(ROOT / 'tools/analysis/compare.py'), run_name='__main__')
    assert error in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('words, queries, layers', [
    ([], [(0.5, 0.5), (0.25, 0.25), (0.75, 0.75)], [0.75, 1.0]),
    (['--queries', '0.2,0.9', '1,0', '--layers', '0.5'], [(0.2, 0.9), (1.0, 0.0)], [0.5]),
])
def test_tool__draws_the_attention_that_is_asked_for(words, queries, layers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'images', ['0.png', '1.png'], size=40)
    (tmp_path / 'images/2.png').write_bytes(b'')
    looked, figures = [], []
    monkeypatch.setattr('mmhdistill.analysis.compare.attention_map', lambda model, output, image, query, share: (
        looked.append((query, share)) or attention_map(model, output, image, query, share)))
    monkeypatch.setattr(compare_figures, 'attention', lambda *args, inner=compare_figures.attention: (
        figures.append(inner(*args)) or figures[0]))
    monkeypatch.setattr(sys, 'argv', [
        'compare.py', f'start:{QUICKSTART}', '--images', 'images', '--out', 'out', *words])
    runpy.run_path(str(ROOT / 'tools/analysis/compare.py'), run_name='__main__')
    assert looked == 2 * [(query, share) for share in layers for query in queries]
    cells = [ax for ax in figures[0].axes if ax.images and len(ax.lines) == 1]
    assert [(*ax.lines[0].get_ydata(), *ax.lines[0].get_xdata()) for ax in cells] == [query for query, _ in looked]
    note = '1 image that cannot be used was left out, for example images/2.png (empty: the file has no bytes).'
    assert note in capsys.readouterr().out.splitlines()
    assert note in json.loads(Path('out/report.json').read_text())['notes']
