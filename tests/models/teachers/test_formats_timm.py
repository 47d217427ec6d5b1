"""Files in the names of timm (MAE, DINO, DINOv2, DeiT, MoCo v3, AugReg), against timm's own models of their weights."""
import argparse
import dataclasses
import re

import pytest
import torch
from safetensors.torch import save_file

from mmhdistill.models.teachers import ViTTeacher

from .native import (
    OBLONG,
    TOLERANCE,
    antialias_rule,
    dino_rule,
    disturb,
    error,
    images,
    load,
    mae_rule,
    moco_v3_positions,
    normalise,
    publish_deit3,
    publish_dinov2,
    resize,
    small_card,
    timm_taps,
    without_head,
)

WIDTH, HEADS = 48, 4


class Native:
    """A small timm model of a published name, with weights of its file.

    Args:
        publish: timm's state dict -> the authors'; timm's own filter leads back.
        rule: grid -> the authors' resampling; None is timm's, in its forward.
        slots: extra tokens that have positions.
    """

    def __init__(self, name, publish=None, rule=None, slots=1, width=WIDTH):
        import timm
        self._create = lambda **kwargs: timm.create_model(
            name, embed_dim=width, depth=3, num_heads=HEADS, num_classes=7, **kwargs).eval()
        model = disturb(self._create())
        self.config = timm.models.get_pretrained_cfg(name)
        self.patch = model.patch_embed.patch_size[0]
        self.grid = model.patch_embed.grid_size
        self.rule, self.slots = rule, slots
        self.state = model.state_dict()
        self.published = publish(self.state) if publish else dict(self.state)
        if publish:
            from timm.models.vision_transformer import checkpoint_filter_fn
            self.state = checkpoint_filter_fn(dict(self.published), model, adapt_layer_scale=True)
            self.state |= {key: x for key, x in model.state_dict().items() if key.startswith('head')}

    def taps(self, x, grid):
        """Of images in 0-1."""
        state = dict(self.state)
        if grid == self.grid:
            model = self._create()
        elif self.rule is None:
            model = self._create(dynamic_img_size=True)
        else:
            state['pos_embed'] = resize(state['pos_embed'], self.slots, self.rule(grid))
            model = self._create(img_size=tuple(side * self.patch for side in grid))
        model.load_state_dict(state)
        return timm_taps(model, normalise(x, self.config.mean, self.config.std))


def compare(native, card, path, grids, width=WIDTH, **kwargs):
    """Loads ``path`` by the shipped card and compares on every grid; the largest error is within tolerance."""
    teacher = load(small_card(card, width, HEADS) if isinstance(card, str) else card, path, **kwargs)
    for grid in grids:
        x = images(grid, native.patch)
        assert error(teacher, native.taps(x, grid), x, grid) <= TOLERANCE
    return teacher.receipt


@pytest.fixture
def write(tmp_path):
    """Saves with torch.save and returns the path."""

    def write(content, name='weights.pth'):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


# 12 tensors in each of 3 blocks; class token, positions, 2 of the patch embedding, 2 of the final norm.
PLAIN = 3 * 12 + 6
SCALED = PLAIN + 3 * 2
DECODER = {
    'mask_token': torch.ones(1, 1, 16), 'decoder_pos_embed': torch.ones(1, 197, 16),
    'decoder_embed.weight': torch.ones(16, WIDTH), 'decoder_embed.bias': torch.ones(16),
    'decoder_blocks.0.norm1.weight': torch.ones(16), 'decoder_blocks.0.attn.qkv.weight': torch.ones(48, 16),
    'decoder_norm.weight': torch.ones(16), 'decoder_pred.weight': torch.ones(768, 16)
}


@pytest.mark.parametrize('card, name', [('mae-vit-b-p16', 'vit_base_patch16_224.mae'),
                                        ('mae-vit-h-p14', 'vit_huge_patch14_224.mae')])
@pytest.mark.parametrize('decoder', [{}, DECODER])
def test_mae__encoder_alone_and_with_decoder(card, name, decoder, write):
    native = Native(name, rule=mae_rule)
    path = write({'model': {**decoder, **without_head(native.published)}})
    receipt = compare(native, card, path, [(224 // native.patch, ) * 2, OBLONG])
    assert (receipt.format, receipt.prefix, receipt.entry, receipt.matched) == ('timm', '', 'model', PLAIN)
    assert sorted(receipt.unused) == sorted(decoder)


@pytest.mark.parametrize('card, name', [
    ('dino-vit-s-p16', 'vit_small_patch16_224.dino'), ('dino-vit-s-p8', 'vit_small_patch8_224.dino'),
    ('dino-vit-b-p16', 'vit_base_patch16_224.dino'), ('dino-vit-b-p8', 'vit_base_patch8_224.dino')])
def test_dino__backbone_alone(card, name, write):
    native = Native(name, rule=dino_rule)
    receipt = compare(native, card, write(without_head(native.published)), [native.grid, OBLONG])
    assert (receipt.format, receipt.matched, receipt.unused) == ('timm', PLAIN, [])


def test_ibot__teacher_alone(write):
    """Model, normalisation and rule for positions are DINO's."""
    native = Native('vit_base_patch16_224.dino', rule=dino_rule)
    path = write({'state_dict': without_head(native.published)}, 'checkpoint_teacher.pth')
    receipt = compare(native, 'ibot-vit-b-p16', path, [(14, 14), (18, 18), OBLONG])
    assert (receipt.format, receipt.entry, receipt.prefix) == ('timm', 'state_dict', '')
    assert (receipt.matched, receipt.unused) == (PLAIN, [])


@pytest.fixture
def dino_training(write):
    """DINO's full checkpoint: teacher and student, each with its head, the optimizer and the command line."""
    teacher, student = (Native('vit_base_patch16_224.dino', rule=dino_rule) for _ in range(2))
    student.state = {name: -x for name, x in without_head(student.state).items()}
    heads = {'head.mlp.0.weight': torch.ones(8, WIDTH), 'head.last_layer.weight_g': torch.ones(8, 1)}
    path = write({
        'student': {f'module.{name}': x for name, x in
                    {**{f'backbone.{n}': x for n, x in student.state.items()}, **heads}.items()},
        'teacher': {**{f'backbone.{n}': x for n, x in without_head(teacher.state).items()}, **heads},
        'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3}]}, 'epoch': 100,
        'args': argparse.Namespace(arch='vit_base', patch_size=16, out_dim=8),
        'dino_loss': {'center': torch.ones(1, 8)}})
    student.state |= {name: x for name, x in teacher.state.items() if name.startswith('head')}
    return teacher, student, path


def test_dino__training_checkpoint_gives_the_teacher(dino_training):
    teacher, _, path = dino_training
    receipt = compare(teacher, 'dino-vit-b-p16', path, [(14, 14)])
    assert (receipt.entry, receipt.prefix, receipt.matched) == ('teacher', 'backbone.', PLAIN)
    assert sorted(receipt.unused) == ['args', 'dino_loss', 'epoch', 'head.last_layer.weight_g', 'head.mlp.0.weight',
                                      'optimizer', 'student']


def test_dino__training_checkpoint_gives_the_student_by_entry(dino_training):
    _, student, path = dino_training
    receipt = compare(student, 'dino-vit-b-p16', path, [(14, 14)], entry='student')
    assert (receipt.entry, receipt.prefix, receipt.matched) == ('student', 'module.backbone.', PLAIN)


@pytest.mark.parametrize('size, timm_size', [('s', 'small'), ('b', 'base'), ('l', 'large'), ('g', 'giant')])
@pytest.mark.parametrize('registers', [0, 4])
def test_dinov2(size, timm_size, registers, write):
    width = 96 if size == 'g' else WIDTH
    native = Native(f'vit_{timm_size}_patch14_{"reg4_" if registers else ""}dinov2.lvd142m', publish_dinov2,
                    rule=antialias_rule if registers else dino_rule, slots=0 if registers else 1, width=width)
    assert native.published['pos_embed'].shape == (1, 1370, width)
    assert ('blocks.0.mlp.w12.weight' in native.published) == (size == 'g')
    receipt = compare(native, f'dinov2-{"reg4-" if registers else ""}vit-{size}-p14', write(native.published),
                      [(37, 37), (16, 16), OBLONG], width=width)
    assert (receipt.matched, receipt.unused) == (SCALED, ['mask_token'])
    assert receipt.mean == pytest.approx([255 * x for x in native.config.mean])


@pytest.mark.parametrize('card, name', [
    ('deit-vit-ti-p16', 'deit_tiny_patch16_224.fb_in1k'), ('deit-vit-s-p16', 'deit_small_patch16_224.fb_in1k'),
    ('deit-vit-b-p16', 'deit_base_patch16_224.fb_in1k')])
def test_deit__head_is_left_aside(card, name, write):
    native = Native(name, rule=mae_rule)
    receipt = compare(native, card, write({'model': native.published}), [(14, 14), OBLONG])
    assert (receipt.matched, receipt.unused) == (PLAIN, ['head.bias', 'head.weight'])


def test_deit__distilled_has_a_second_token(write):
    native = Native('deit_base_distilled_patch16_224.fb_in1k', rule=mae_rule, slots=2)
    assert native.published['pos_embed'].shape == (1, 198, WIDTH)
    path = write({'model': native.published})
    receipt = compare(native, 'deit-distilled-vit-b-p16', path, [(14, 14), OBLONG])
    assert (receipt.matched, receipt.unused) == (
        PLAIN, ['head.bias', 'head.weight', 'head_dist.bias', 'head_dist.weight'])
    with pytest.raises(ValueError, match=r'1 unexpected \(dist_token\); 1 of another shape \(pos_embed is \(1, 198, '
                                         r'48\) instead of \(1, 197, 48\)\)'):
        load(small_card('deit-vit-b-p16', WIDTH, HEADS), path)


@pytest.mark.parametrize('card, name', [
    ('deit3-vit-s-p16', 'deit3_small_patch16_224.fb_in1k'),
    ('deit3-vit-b-p16', 'deit3_base_patch16_224.fb_in1k'),
    ('deit3-vit-b-p16-in21k', 'deit3_base_patch16_224.fb_in22k_ft_in1k'),
    ('deit3-vit-l-p16', 'deit3_large_patch16_224.fb_in1k'),
    ('deit3-vit-l-p16-in21k', 'deit3_large_patch16_224.fb_in22k_ft_in1k')])
def test_deit3__positions_without_class_slot_and_layer_scale(card, name, write):
    native = Native(name, publish_deit3, rule=mae_rule, slots=0)
    assert native.published['pos_embed'].shape == (1, 196, WIDTH)
    assert 'blocks.2.gamma_2' in native.published
    receipt = compare(native, card, write({'model': native.published}), [(14, 14), OBLONG])
    assert (receipt.matched, receipt.unused) == (SCALED, ['head.bias', 'head.weight'])


def moco_v3(seed):
    """timm's model with MoCo v3's fixed positions."""
    native = Native('vit_base_patch16_224.augreg_in21k')
    native.state = {name: x.roll(seed, 0) for name, x in native.state.items()}
    native.state['pos_embed'] = moco_v3_positions((14, 14), WIDTH)
    # It was trained on ImageNet's own normalisation, unlike AugReg.
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    native.config = dataclasses.replace(native.config, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    return native


@pytest.fixture
def moco_training(write):
    base, momentum = moco_v3(0), moco_v3(1)
    state = {}
    for part, native in (('momentum_encoder', momentum), ('base_encoder', base)):
        state |= {f'module.{part}.{name}': x for name, x in without_head(native.state).items()}
        state[f'module.{part}.head.0.weight'] = torch.ones(8, WIDTH)
        state[f'module.{part}.head.1.running_mean'] = torch.ones(8)
    state['module.predictor.0.weight'] = torch.ones(8, 8)
    path = write({'epoch': 300, 'arch': 'vit_base', 'state_dict': state, 'scaler': {'scale': 1.0},
                  'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3}]}}, 'vit-b-300ep.pth.tar')
    return base, momentum, path


def moco_taps(native, x, grid):
    model = native._create(img_size=tuple(side * 16 for side in grid))
    model.load_state_dict({**native.state, 'pos_embed': moco_v3_positions(grid, WIDTH)})
    return timm_taps(model, normalise(x, native.config.mean, native.config.std))


@pytest.mark.parametrize('card', ['mocov3-vit-s-p16', 'mocov3-vit-b-p16'])
@pytest.mark.parametrize('prefix', [None, 'module.base_encoder.', 'module.momentum_encoder.'])
def test_moco_v3__encoder_of_the_training_file(card, prefix, moco_training):
    base, momentum, path = moco_training
    teacher = load(small_card(card, WIDTH, HEADS), path, prefix=prefix)
    native = momentum if prefix == 'module.momentum_encoder.' else base
    for grid in ((14, 14), (9, 9)):
        x = images(grid, 16)
        assert error(teacher, moco_taps(native, x, grid), x, grid) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.prefix, receipt.entry, receipt.matched) == (prefix or 'module.base_encoder.', 'state_dict', PLAIN)
    # The other encoder's 42, two of each head, the predictor; epoch, arch, scaler and optimizer beside.
    assert len(receipt.unused) == PLAIN + 2 * 2 + 1 + 4


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2**-12), (torch.bfloat16, 2**-9)])
def test_moco_v3__positions_of_a_file_in_half_precision(dtype, tolerance, write):
    state = {name: x.to(dtype) for name, x in without_head(moco_v3(0).state).items()}
    teacher = load(small_card('mocov3-vit-b-p16', WIDTH, HEADS), write(state))
    assert 0 < (teacher.vit.pos_embed - moco_v3_positions((14, 14), WIDTH)).abs().max() <= tolerance


@pytest.mark.parametrize('change, difference', [
    (lambda x: x * 1.05, '0.05'), (lambda x: torch.cat([x[:, :1], x[:, 1:].roll(14, 1)], dim=1), r'1\.\d+'),
    (lambda x: torch.cat([x[:, :1], x[:, 1:].unflatten(1, (14, 14)).transpose(1, 2).flatten(1, 2)], dim=1),
     r'1\.\d+')], ids=['scaled', 'shifted', 'rows for columns'])
def test_moco_v3__refuses_other_positions_than_its_own(change, difference, write):
    state = without_head(moco_v3(0).state)
    state['pos_embed'] = change(state['pos_embed'])
    card, path = small_card('mocov3-vit-b-p16', WIDTH, HEADS), write(state)
    teacher = ViTTeacher(card, str(path))
    with pytest.raises(ValueError) as caught:
        teacher.load()
    assert re.fullmatch(re.escape(f"{path} does not fit card 'mocov3-vit-b-p16': its positions differ by ")
                        + difference + re.escape(' from the fixed sin-cos embedding of this card. Nothing was loaded; '
                                                 'give the card of this file.'), str(caught.value))
    assert all(p.is_meta for p in teacher.vit.parameters())
    # Of a card whose positions are learned, they are the file's.
    load(dataclasses.replace(card, resampling='bicubic'), path)


def test_moco_v3__refuses_the_positions_of_mae(write):
    """Fixed sin-cos too, in another order."""
    state = without_head(moco_v3(0).state)
    extra, x, y = state['pos_embed'][:, :1], *state['pos_embed'][:, 1:].chunk(2, dim=-1)
    state['pos_embed'] = torch.cat([extra, torch.cat([y, x], dim=-1)], dim=1)
    with pytest.raises(ValueError, match=r'its positions differ by 1\.\d+ from the fixed sin-cos embedding'):
        load(small_card('mocov3-vit-s-p16', WIDTH, HEADS), write(state))


@pytest.mark.parametrize('card, name', [
    ('augreg-vit-s-p16-in21k', 'vit_small_patch16_224.augreg_in21k'),
    ('augreg-vit-b-p16-in21k', 'vit_base_patch16_224.augreg_in21k'),
    ('augreg2-vit-b-p16', 'vit_base_patch16_224.augreg2_in21k_ft_in1k'),
    ('augreg-vit-l-p16-in21k', 'vit_large_patch16_224.augreg_in21k')])
def test_augreg__safetensors_of_timm(card, name, tmp_path):
    native = Native(name)
    save_file(native.published, tmp_path / 'model.safetensors')
    receipt = compare(native, card, tmp_path / 'model.safetensors', [(14, 14), OBLONG])
    assert (receipt.matched, receipt.entry, receipt.unused) == (PLAIN, '', ['head.bias', 'head.weight'])


def test_entry__chooses_the_averaged_weights(write):
    native = Native('vit_base_patch16_224.mae', rule=mae_rule)
    other = {name: x.roll(1, 0) for name, x in native.published.items()}
    path = write({'model': other, 'model_ema': native.published, 'epoch': 1})
    receipt = compare(native, 'mae-vit-b-p16', path, [(14, 14)], entry='model_ema')
    assert (receipt.entry, receipt.matched) == ('model_ema', PLAIN)
    # The other dict is another model.
    teacher, x = load(small_card('mae-vit-b-p16', WIDTH, HEADS), path), images((14, 14), 16)
    assert teacher.receipt.entry == 'model'
    assert error(teacher, native.taps(x, (14, 14)), x, (14, 14)) > 0.1
    with pytest.raises(ValueError, match=r"has no entry 'ema': its entries are \['model', 'model_ema'\]"):
        load(small_card('mae-vit-b-p16', WIDTH, HEADS), path, entry='ema')


@pytest.mark.parametrize('grid, wrong', [
    ((14, 14), dict(norm_eps=1e-5)), ((14, 14), dict(activation='gelu_tanh')), ((14, 14), dict(num_heads=3)),
    ((14, 14), dict(mean=(127.5, ) * 3)), ((14, 14), dict(std=(127.5, ) * 3)), (OBLONG, dict(resampling='bicubic')),
    (OBLONG, dict(resampling='bicubic-antialias')), (OBLONG, dict(resampling='bilinear-corners'))])
def test_error__shows_every_flag_of_a_card_that_shapes_do_not(grid, wrong, write):
    """What the comparisons above would not notice, they would not test."""
    native = Native('vit_base_patch16_224.dino', rule=dino_rule)
    path, x = write(without_head(native.published)), images(grid, 16)
    card = small_card('dino-vit-b-p16', WIDTH, HEADS)
    expected = native.taps(x, grid)
    assert error(load(card, path), expected, x, grid) <= TOLERANCE
    assert error(load(dataclasses.replace(card, **wrong), path), expected, x, grid) > 10 * TOLERANCE


@pytest.mark.parametrize('wrong, message', [
    (dict(pre_norm=True), r'2 missing \(norm_pre\.weight, norm_pre\.bias\); 1 unexpected \(patch_embed\.proj\.bias\)'),
    (dict(layer_scale=False), r'6 unexpected \(blocks\.0\.ls1\.gamma, '),
    (dict(registers=0), r'1 unexpected \(register_tokens\)'),
    (dict(registers=3), r'1 of another shape \(cls_token \+ register_tokens is \(1, 5, 48\) instead of \(1, 4, 48\)'),
    (dict(class_token=False, registers=0), r'2 unexpected \(cls_token, register_tokens\)'),
    (dict(patch_size=16), r'patch_embed\.proj\.weight is \(48, 3, 14, 14\) instead of \(48, 3, 16, 16\)'),
    (dict(img_size=224), r'pos_embed is \(1, 1374, 48\) instead of \(1, 261, 48\)'),
    (dict(swiglu=True), r'12 missing \(blocks\.0\.mlp\.w12\.weight, ')])
def test_load__refuses_a_card_of_other_shapes(wrong, message, write):
    native = Native('vit_base_patch14_reg4_dinov2.lvd142m', publish_dinov2, rule=antialias_rule, slots=0)
    path = write(native.published)
    teacher = ViTTeacher(dataclasses.replace(small_card('dinov2-reg4-vit-b-p14', WIDTH, HEADS), **wrong), str(path))
    with pytest.raises(ValueError, match=message):
        teacher.load()
    assert all(p.is_meta for p in teacher.vit.parameters())
