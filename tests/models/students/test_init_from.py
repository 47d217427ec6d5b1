"""Students that start from the weights of a card's model."""
import dataclasses
import hashlib
import re

import pytest
import torch
from torch.testing import assert_close

from mmhdistill.models import MaskableVisionTransformer, ViTTeacher, find_card
from mmhdistill.models.teachers import CARDS
from mmhdistill.registry import MODELS
from tests.helpers import IMAGENET, OTHER, log_messages, randomise, tiny_card, tiny_distiller, tiny_teacher

from ..teachers.native import (
    OBLONG,
    TAPS,
    disturb,
    mae_rule,
    moco_v3_positions,
    resize,
    small_card,
    timm_taps,
    without_head,
)

NORMS = dict(type='LN', eps=1e-6)
FEATURES = {2: frozenset({'features'})}


def fields(card):
    return {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}


def student(card, path, img_size=None, **kwargs):
    """Of the card's architecture, as a config writes it."""
    arch = dict(embed_dims=card.embed_dims, num_layers=card.depth, num_heads=card.num_heads,
                feedforward_channels=round(card.embed_dims * card.mlp_ratio))
    init_from = dict(card=fields(card), checkpoint=str(path))
    return MaskableVisionTransformer(**{**dict(
        arch=arch, img_size=img_size or card.img_size, patch_size=card.patch_size, out_type='raw', norm_cfg=NORMS,
        init_from=init_from), **kwargs})


def started(*args, **kwargs):
    vit = student(*args, **kwargs)
    vit.init_weights()
    vit.eval()
    return vit


@pytest.fixture
def mae(tmp_path):
    """A small timm model, and its file as MAE publishes it."""
    import timm
    native = disturb(timm.create_model('vit_base_patch16_224.mae', embed_dim=48, depth=3, num_heads=4))
    torch.save(dict(model=without_head(native.state_dict()), epoch=7), tmp_path / 'mae.pth')
    return native, small_card('mae-vit-b-p16', 48, 4), tmp_path / 'mae.pth'


@pytest.fixture
def moco(tmp_path):
    """A small timm model with MoCo v3's positions, and its training file: two encoders, projectors, an optimiser."""
    import timm
    native = disturb(timm.create_model('vit_small_patch16_224', embed_dim=48, depth=3, num_heads=12, num_classes=0))
    native.pos_embed.data.copy_(moco_v3_positions((14, 14), 48))
    state = native.state_dict()
    momentum = {f'module.momentum_encoder.{name}': x + 1 for name, x in state.items()}
    base = {f'module.base_encoder.{name}': x for name, x in state.items()}
    head = {'module.base_encoder.head.0.weight': torch.ones(2), 'module.predictor.0.weight': torch.ones(2)}
    path = tmp_path / 'moco.pth'
    torch.save(dict(epoch=300, state_dict={**momentum, **base, **head}, optimizer=dict(state={})), path)
    return native, small_card('mocov3-vit-s-p16', 48, 12), path


def images(grid, patch=16):
    return torch.randn(2, 3, *(side * patch for side in grid), generator=torch.Generator().manual_seed(3))


def assert_native(vit, native, x):
    """q, k, v of all blocks and the final features, relative to the largest value."""
    out, expected = vit.encode(x, TAPS).taps, timm_taps(native, x)
    errors = {key: ((out[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in out}
    assert len(errors) == 11 and max(errors.values()) < 1e-6, errors
    assert expected[2, 'features'].std() > 0.3


@pytest.mark.parametrize('source', ['mae', 'moco'])
def test_init_weights__first_forward_is_the_native_one(request, source):
    native, card, path = request.getfixturevalue(source)
    vit = started(card, path)
    assert_native(vit, native, images((14, 14)))
    state = vit.state_dict()
    assert torch.equal(state['layers.1.attn.qkv.weight'], native.blocks[1].attn.qkv.weight)
    assert torch.equal(state['pos_embed'], native.pos_embed)
    assert [name for name, p in vit.named_parameters() if not p.requires_grad] == []


@pytest.mark.parametrize('source', ['mae', 'moco'])
@pytest.mark.parametrize('grid', [OBLONG, (20, 20)])
def test_init_weights__positions_follow_the_students_grid_by_the_cards_rule(request, source, grid):
    native, card, path = request.getfixturevalue(source)
    vit = started(card, path, img_size=tuple(16 * side for side in grid))
    expected = resize(native.pos_embed, 1, mae_rule(grid)) if source == 'mae' \
        else torch.cat([torch.zeros(1, 1, 48), _sincos(grid, 48)], dim=1)
    assert_close(vit.pos_embed.detach(), expected, rtol=0, atol=1e-6)
    import timm
    other = timm.create_model('vit_base_patch16_224', embed_dim=48, depth=3, num_heads=card.num_heads, num_classes=0,
                              img_size=tuple(16 * side for side in grid)).eval()
    other.load_state_dict({**without_head(native.state_dict()), 'pos_embed': expected})
    assert_native(vit, other, images(grid))


def _sincos(grid, channels):
    """MoCo v3's definition, position by position: sines and cosines of the row, then of the column."""
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [[place / 10000**(i / (channels // 4)) for i in range(channels // 4)] for place in (row, column)]
            rows.append(torch.cat([f(torch.tensor(angle, dtype=torch.float64)) for angle in angles
                                   for f in (torch.sin, torch.cos)]))
    return torch.stack(rows)[None].float()


def test_init_weights__prefix_chooses_another_encoder(moco):
    native, card, path = moco
    native.load_state_dict({name: x + 1 for name, x in native.state_dict().items()})
    # The positions of this one are no sin-cos embedding: a card of resampled ones takes it.
    card = dataclasses.replace(card, resampling='bicubic')
    init_from = dict(card=fields(card), checkpoint=str(path), prefix='module.momentum_encoder.')
    vit = started(card, path, init_from=init_from)
    assert torch.equal(vit.state_dict()['layers.2.ffn.layers.1.weight'], native.blocks[2].mlp.fc2.weight)
    assert torch.equal(vit.pos_embed, native.pos_embed)


def test_init_weights__positions_that_are_not_the_cards_are_refused(moco):
    native, card, path = moco
    native.pos_embed.data[0, 5] += 0.5
    torch.save(native.state_dict(), path)
    vit = student(card, path)
    with pytest.raises(ValueError, match=rf"^{path} does not fit card 'mocov3-vit-s-p16': its positions differ by 0\.5 "
                                         'from the fixed sin-cos embedding of this card'):
        vit.init_weights()
    assert vit.receipt is None
    # Drawn anew before loading, and nothing of the file is in it.
    assert vit.pos_embed.abs().max() < 0.2


def test_init_weights__drop_path_acts_on_the_loaded_weights(mae):
    native, card, path = mae
    vit = started(card, path, drop_path_rate=0.5)
    x = images((14, 14))
    assert_native(vit, native, x)
    vit.train()
    torch.manual_seed(0)
    samples = torch.stack([vit.encode(x[:1], {2: frozenset({'hidden'})}).taps[2, 'hidden'] for _ in range(8)])
    expected = timm_taps(native, x[:1])[2, 'hidden']
    distance = ((samples - expected).abs().amax((1, 2, 3)) / expected.abs().max())
    # A block that is left out shows; the first block, of rate 0, is never.
    assert (distance > 1e-2).sum() >= 4
    first = vit.encode(x, {1: frozenset('q')}).taps[1, 'q']
    assert_close(first, timm_taps(native, x)[1, 'q'], rtol=0, atol=1e-5)


@pytest.mark.parametrize('kwargs, differences', [
    (dict(arch=dict(embed_dims=48, num_layers=3, num_heads=2, feedforward_channels=192)),
     '1 differences; heads: 4 there, 2 here'),
    (dict(layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU'))),
     "1 differences; activation: GELU(approximate='none') there, QuickGELU() here"),
    (dict(layer_cfgs=dict(act_cfg=dict(type='GELU', approximate='tanh'))),
     "1 differences; activation: GELU(approximate='none') there, GELU(approximate='tanh') here"),
    (dict(norm_cfg=dict(type='LN', eps=1e-5)), '1 differences; eps of norms: 1e-06 there, 1e-05 here'),
    (dict(patch_size=32),
     '1 differences; patch_embed.projection.weight: (48, 3, 16, 16) there, (48, 3, 32, 32) here'),
    (dict(arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=192)),
     '38 differences; cls_token: (1, 1, 48) there, (1, 1, 64) here; '),
    (dict(arch=dict(embed_dims=48, num_layers=4, num_heads=4, feedforward_channels=192)),
     '12 differences; layers.3.ln1.weight: none there, (48,) here; '),
    (dict(arch=dict(embed_dims=48, num_layers=3, num_heads=4, feedforward_channels=96)),
     '9 differences; layers.0.ffn.layers.0.0.weight: (192, 48) there, (96, 48) here; '),
    (dict(with_cls_token=False), '1 differences; cls_token: (1, 1, 48) there, none here'),
    (dict(pre_norm=True), '3 differences; patch_embed.projection.bias: (48,) there, none here; '),
    (dict(layer_scale_init_value=1e-5), '6 differences; layers.0.attn.gamma1.weight: none there, (48,) here; ')])
def test_init_weights__another_architecture_is_refused(mae, kwargs, differences):
    _, card, path = mae
    vit = student(card, path, **kwargs)
    with pytest.raises(ValueError, match=re.escape(
            f"the student cannot start from 'mae-vit-b-p16', a ViT of another architecture ({differences}")) as caught:
        vit.init_weights()
    cure = '): give it the arch, patch size and tokens of that card, or leave init_from out.'
    assert str(caught.value).endswith(cure)
    assert vit.receipt is None


def test_init_weights__registers_are_not_for_students(tmp_path):
    card = find_card(tiny_card(registers=2))
    torch.save(ViTTeacher(card, checkpoint=None).vit.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=re.escape('cls_token: (1, 3, 32) there, (1, 1, 32) here')):
        student(card, tmp_path / 'w.pth').init_weights()


def test_init_weights__file_that_does_not_fit_the_card(mae):
    native, card, path = mae
    state = without_head(native.state_dict())
    del state['blocks.1.attn.proj.weight']
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"^{path} does not fit card 'mae-vit-b-p16' \(3 layers of width 48, patch "
                                         r'16\): 1 missing \(blocks\.1\.attn\.proj\.weight\)\. Nothing was loaded'):
        student(card, path).init_weights()


def test_init_weights__receipt(mae):
    _, card, path = mae
    vit = student(card, path)
    assert vit.receipt is None
    with log_messages() as messages:
        vit.init_weights()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    told, = [m for m in messages if m.startswith('student')]
    assert told == f"""\
student 'backbone': mae-vit-b-p16 (licence CC-BY-NC-4.0)
  file     {path}
  sha256   {digest}, another file than the published one
  tensors  42/42, timm format in entry 'model', float32; left aside: epoch
  images   RGB mean 123.67 116.28 103.53, std 58.40 57.12 57.38 in 0-255"""
    assert vit.receipt.as_dict()['sha256'] == digest
    assert (vit.receipt.role, vit.receipt.name, vit.receipt.matched) == ('student', 'backbone', 42)


def test_init_weights__random_weights_for_tests(mae):
    _, card, _ = mae
    torch.manual_seed(0)
    vit = student(card, '', init_from=dict(card='mae-vit-h-p14', checkpoint=None))
    with log_messages() as messages:
        vit.init_weights()
    assert [m for m in messages if 'random weights' in m] == [
        'the student starts from random weights (init_from.checkpoint=None): good for trying things out only']
    assert vit.receipt is None
    # truncated normal, as without init_from
    assert 0.01 < vit.layers[0].attn.qkv.weight.std() < 0.1


@pytest.mark.parametrize('given, said', [
    (dict(sha256='00', checkpoint='w.pth'), "['checkpoint', 'sha256']"), ('mae-vit-b-p16', "'mae-vit-b-p16'")])
def test_init__no_card(given, said):
    message = (f'init_from names no card, only {said}: give dict(card=...), the card of the weights that the student '
               'starts from.')
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        MaskableVisionTransformer('s', init_from=given)


def test_init__misspelt_key():
    with pytest.raises(ValueError, match=r"does not know \['chekpoint'\]: it takes \['card', 'checkpoint'"):
        MaskableVisionTransformer('s', init_from=dict(card='mae-vit-b-p16', chekpoint='w.pth'))


def test_init__two_starts():
    with pytest.raises(ValueError, match='both init_from and init_cfg'):
        MaskableVisionTransformer('s', init_from=dict(card='mae-vit-b-p16'),
                                  init_cfg=dict(type='Pretrained', checkpoint='w.pth'))


def test_init__unknown_card():
    with pytest.raises(ValueError, match="^unknown teacher card 'mae-vit-b'. Did you mean 'mae-vit-b-p16'?"):
        MaskableVisionTransformer('s', init_from=dict(card='mae-vit-b'))


def test_init__without_init_from_nothing_is_said():
    vit = MaskableVisionTransformer('deit-tiny', img_size=32)
    with log_messages() as messages:
        vit.init_weights()
    assert [m for m in messages if 'start' in m] == []
    assert (vit.receipt, vit.init_from) == (None, None)


def distiller(path, card, **normalisation):
    backbone = dict(type='mmhdistill.MaskableVisionTransformer', img_size=32, patch_size=8, norm_cfg=NORMS,
                    arch=dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=128),
                    init_from=dict(card=card, checkpoint=str(path)))
    values = {**IMAGENET, **normalisation}
    return tiny_distiller(backbone=backbone, teachers=dict(mae=tiny_teacher()), masker=None,
                          losses=dict(relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae')),
                          data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **values))


def test_distiller__starts_the_student_and_has_it_in_the_manifest(tmp_path):
    source = randomise(ViTTeacher(tiny_card(), checkpoint=None).vit)
    torch.save(source.state_dict(), tmp_path / 'w.pth')
    model = MODELS.build(distiller(tmp_path / 'w.pth', tiny_card()))
    assert model.manifest == {}
    with log_messages() as messages:
        model.init_weights()
    assert list(model.manifest) == ['mae', 'backbone']
    assert model.manifest['backbone']['source'] == str(tmp_path / 'w.pth')
    assert [m.splitlines()[0] for m in messages if m.startswith('student')] == ["student 'backbone': tiny"]
    model.backbone.eval()
    x = images((4, 4), 8)
    assert_close(model.backbone.encode(x, FEATURES).patches(2, 'features'), source(x)[0][:, 1:], rtol=0, atol=1e-6)


# The last is the same, as others round it.
@pytest.mark.parametrize('given, fits', [(dict(mean=OTHER['mean']), False), (dict(std=[57.0] * 3), False),
                                         (dict(mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4]), True)])
def test_distiller__images_that_the_start_was_not_trained_on_are_refused(tmp_path, given, fits):
    cfg = distiller(tmp_path / 'w.pth', tiny_card(), **given)
    if fits:
        assert MODELS.build(cfg).backbone.init_from.card.name == 'tiny'
        return
    own = 'mean [123.675, 116.28, 103.53] and std [58.395, 57.12, 57.375]'
    message = re.escape(f"the student starts from 'tiny', which was trained on images of {own}, but is fed ")
    cure = re.escape(": give data_preprocessor the card's.")
    with pytest.raises(ValueError, match=rf'^{message}mean \[.*\] and std \[.*\]{cure}$'):
        MODELS.build(cfg)


def test_cards__another_cards_file_is_refused_by_its_name(mae, monkeypatch):
    _, card, path = mae
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(CARDS, 'other', dataclasses.replace(card, name='other', sha256=digest[:8]))
    with pytest.raises(ValueError, match=rf"^{path} is the file of card 'other', and not of 'mae-vit-b-p16': give the "
                                         'file of this card, or that card'):
        student(card, path).init_weights()
