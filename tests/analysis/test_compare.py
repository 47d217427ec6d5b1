import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmhdistill.analysis.compare import (
    attention_map,
    cka_matrices,
    compare,
    describe,
    kept_tokens,
    read_images,
    resized,
    run,
)
from mmhdistill.analysis.zoo import Model, load_model
from mmhdistill.functional import attention_distance, attention_from_qk, attention_nmi, effective_rank
from mmhdistill.models.taps import ViTOutput, ViTSpec
from mmhdistill.models.vit import encode
from mmhdistill.registry import MODELS
from tests.helpers import build_distiller, write_images

ROOT = Path(__file__).parents[2]
QUICKSTART = 'mmhdistill::quickstart/hdistill_vit-photos.py'


@pytest.fixture(scope='module')
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Of a distiller of width 32, depth 3, 4 x 4 patches of 8 px."""
    distiller = build_distiller()
    path = tmp_path_factory.mktemp('run') / 'epoch_1.pth'
    backbone = dict(type='mmhdistill.MaskableVisionTransformer', img_size=32, patch_size=8,
                    arch=dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64))
    text = Config(dict(model=dict(backbone=backbone, data_preprocessor=dict(
        mean=[100.0, 110.0, 120.0], std=[50.0, 55.0, 60.0], bgr_to_rgb=True)))).pretty_text
    torch.save(dict(state_dict=distiller.state_dict(), meta=dict(cfg=text)), path)
    return path, distiller


def test_load_model__checkpoint_sees_normalised_images(checkpoint, images):
    path, distiller = checkpoint
    model = load_model(str(path))
    assert (model.name, model.image_size, model.spec.depth) == (f'{path.parent.name}/epoch_1', 32, 3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([100.0, 110.0, 120.0], [50.0, 55.0, 60.0]))
    taps = {2: frozenset({'features'})}
    distiller.eval()
    with torch.no_grad():
        want = encode(distiller.backbone, (images - mean) / std, taps).taps[2, 'features']
    torch.testing.assert_close(model.run(images, taps).taps[2, 'features'], want)


@pytest.mark.parametrize('kind, fields', [('MAEViT', dict(mask_ratio=0.5)), ('mmpretrain.MoCoV3ViT', {})])
def test_load_model__encoder_of_a_method_of_mmpretrain(kind, fields, images, tmp_path):
    arch = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=96)
    backbone = dict(type=kind, img_size=32, patch_size=8, arch=arch, **fields)
    torch.manual_seed(0)
    encoder = MODELS.build({**backbone, 'type': 'mmpretrain.' + kind.split('.')[-1]})
    encoder.init_weights()
    encoder.eval()
    mean, std = [100.0, 110.0, 120.0], [50.0, 55.0, 60.0]
    cfg = Config(dict(model=dict(type='MAE', backbone=backbone, neck=dict(type='x'), data_preprocessor=dict(
        mean=mean, std=std))))
    state = {f'backbone.{name}': x for name, x in encoder.state_dict().items()}
    torch.save(dict(state_dict={**state, 'neck.weight': torch.zeros(2)}, meta=dict(cfg=cfg.pretty_text)),
               tmp_path / 'epoch_9.pth')
    model = load_model(f'mine:{tmp_path}/epoch_9.pth')
    assert (model.name, model.image_size, model.spec.num_heads) == ('mine', 32, 4)
    inputs = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        want = encoder(inputs, mask=None) if kind == 'MAEViT' else encoder(inputs)
    found = model.run(images, {2: frozenset({'features'})}).taps[2, 'features']
    torch.testing.assert_close(found if kind == 'MAEViT' else found[:, 0], want[0])


def test_load_model__config_card_and_label(images):
    model = load_model(f'a student:{QUICKSTART}')
    assert (model.name, model.image_size, model.spec.embed_dims) == ('a student', 32, 64)
    assert model.settings['model']['masker']['teacher'] == 'mae'
    # Mean and std of the config: grey images of its mean are zeros to it.
    taps = {0: frozenset({'q'})}
    grey = model.run(torch.full((1, 3, 32, 32), 120.0), taps).taps[0, 'q'][:, 1:]
    zeros = load_model(QUICKSTART).run(torch.zeros(1, 3, 32, 32) + 120, taps).taps[0, 'q'][:, 1:]
    assert grey.shape == zeros.shape == (1, 64, 64)
    card = load_model('deit-vit-ti-p16=None')
    assert (card.name, card.image_size, card.spec.depth, card.spec.patch_size) == ('deit-vit-ti-p16', 224, 12, 16)


@pytest.mark.parametrize('text, error', [
    ('deit-vit-tiny', "unknown teacher card 'deit-vit-tiny'"),
    ('none/epoch_1.pth', 'none/epoch_1.pth does not exist'),
    ('mmhdistill::quickstart/none.py', "config 'mmhdistill::quickstart/none.py' is not in mmhdistill"),
])
def test_load_model__what_is_not_there(text, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        load_model(text)


def test_describe__is_what_the_functions_say(checkpoint, images):
    model = load_model(str(checkpoint[0]))
    output = run(model, images)
    found = describe(model, output)
    for layer in range(3):
        attention = attention_from_qk(output.taps[layer, 'q'], output.taps[layer, 'k'], 4, 1)
        assert found['nmi'][layer] == pytest.approx(attention_nmi(attention).tolist())
        assert found['distance'][layer] == pytest.approx(attention_distance(attention, (4, 4), 8).tolist())
        tokens = output.taps[layer, 'hidden'][:, 1:].reshape(48, 32)
        assert found['rank'][layer] == pytest.approx(effective_rank(tokens).item())
        assert len(found['fourier'][layer]) == 3


def test_cka__of_a_model_with_itself_and_of_two_grids(checkpoint, images):
    one, other = load_model(str(checkpoint[0])), load_model(QUICKSTART)
    outputs = {one.name: run(one, images), other.name: run(other, images)}
    matrices = cka_matrices([one, other], outputs)
    assert {pair: tuple(matrix.shape) for pair, matrix in matrices.items()} == {
        (one.name, one.name): (3, 3), (one.name, other.name): (3, 4), (other.name, other.name): (4, 4)}
    for name in (one.name, other.name):
        assert matrices[name, name].diagonal().tolist() == pytest.approx([1.0] * len(matrices[name, name]))
        assert torch.allclose(matrices[name, name], matrices[name, name].T)
    assert 0 < matrices[one.name, other.name].max() < 0.99


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
    owner = load_model(QUICKSTART)
    rates, strips = kept_tokens([owner], owner, images)
    assert rates == [0.7] and [int(mask.sum()) for mask in strips[0]] == [3 * 45, 3 * 31, 3 * 22]
    for less, more in zip(strips[0][1:], strips[0]):
        assert (less <= more).all()
    owner.settings['custom_hooks'] = [dict(type='mmhdistill.RedundantTokenMasker', schedule='linear', start=1.0)]
    rates, strips = kept_tokens([owner], owner, images)
    assert rates == pytest.approx([1.0, 0.925, 0.85, 0.775, 0.7])
    assert strips[0][-1].all() and int(strips[-1][-1].sum()) == 3 * 22


def test_kept_tokens__of_a_random_masker(images):
    owner = load_model('mmhdistill::quickstart/moma_moco-mae_vit-photos.py')
    rates, strips = kept_tokens([owner], owner, images)
    assert rates == [0.1] and [int(mask.sum()) for mask in strips[0]] == [3 * 6]


def test_read_images__middle_squares_evenly_over_the_folder(tmp_path):
    from mmcv import imwrite
    for index in range(5):
        image = torch.zeros(20, 40, 3).byte()
        image[:, 10:30, 2] = 50 * index  # red, in BGR
        image[:, :10, 0] = 255
        imwrite(image.numpy(), str(tmp_path / f'{index}.png'))
    read = read_images(tmp_path, 3, 10)
    assert read.shape == (3, 3, 10, 10)
    for image, red in zip(read, (0, 100, 200)):
        assert image[0].flatten().tolist() == pytest.approx([red] * 100, abs=0.1)
        assert not image[1:].any()


def test_compare__page_holds_everything(checkpoint, images, tmp_path):
    models = [load_model(f'mine:{checkpoint[0]}'), load_model(f'<random>:{QUICKSTART}')]
    report = compare(models, images, tmp_path)
    assert json.loads((tmp_path / 'report.json').read_text()) == report
    assert sorted(path.name for path in tmp_path.glob('*.png')) == [
        'attention.png', 'cka.png', 'diversity.png', 'fourier.png', 'kept-4.png']
    text = (tmp_path / 'report.html').read_text()
    assert text.count('<img') == text.count('src="data:image/png;base64,') == 5
    assert 'http' not in re.sub(r'base64,[^"]*', '', text) and '&lt;random&gt;' in text and '<random>' not in text
    for name in ('mine', '<random>'):
        for layer, heads in enumerate(report[name]['nmi']):
            assert f'<td>{layer}</td><td>{sum(heads) / len(heads):.4f}</td>' in text


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
