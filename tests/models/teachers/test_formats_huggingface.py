"""Files in the layouts of transformers, saved by its own models and compared with them.

At another size transformers resamples positions by a rule of its own, so there its models hold positions that were
resampled as the authors do.
"""
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmhdistill.models.teachers import CARDS

from .native import (
    DEPTH,
    OBLONG,
    TOLERANCE,
    antialias_rule,
    big_vision_rule,
    dino_rule,
    disturb,
    error,
    images,
    load,
    mae_rule,
    native_taps,
    normalise,
    resize,
    small_card,
)

WIDTH, HEADS = 48, 4
SIZE = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
# Some of transformers' models embed square images only.
SMALLER = (9, 9)
# 16 tensors in each of 3 blocks, as q, k and v are apart there; the receipt counts our 12.
PLAIN = 3 * 12 + 6


def same(out):
    return out


def clip_taps(tower, x):
    return native_taps(lambda: tower(x), tower.encoder.layers, tower.post_layernorm,
                       lambda block: [(getattr(block.self_attn, f'{part}_proj'), same) for part in 'qkv'])


def vit_taps(model, x, **kwargs):
    def project(block):
        attention = block.attention.attention
        return [(getattr(attention, part), same) for part in ('query', 'key', 'value')]

    return native_taps(lambda: model(x, **kwargs), model.encoder.layer, model.layernorm, project)


def saved(model, tmp_path, extra=None):
    """The safetensors file that transformers writes, with ``extra`` tensors that older releases wrote."""
    model.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    if extra:
        save_file({**load_file(path), **extra}, path, metadata={'format': 'pt'})
    return path


def at_grid(state, key, slots, rule):
    """The state of a model with the positions under ``key`` resampled; a table of them stays a table."""
    positions = state[key]
    moved = resize(positions if positions.dim() == 3 else positions[None], slots, rule)
    return {**state, key: moved if positions.dim() == 3 else moved[0]}


@pytest.mark.parametrize('card, facts', [
    ('siglip-vit-b-p16', dict(patch_size=16, image_size=224)),
    ('siglip-vit-l-p16-256', dict(patch_size=16, image_size=256)),
    # Of google/siglip-so400m-patch14-384: 4304 over 1152 channels, here 269 over 72.
    ('siglip-vit-so400m-p14-384', dict(patch_size=14, image_size=384, hidden_size=72, intermediate_size=269))])
def test_siglip__two_towers_of_transformers(card, facts, tmp_path):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel
    vision = {**SIZE, **facts}
    config = SiglipConfig(vision_config=vision, text_config={**SIZE, 'vocab_size': 11, 'max_position_embeddings': 7})
    model = disturb(SiglipModel(config))
    teacher = load(small_card(card, vision['hidden_size'], HEADS), saved(model, tmp_path))
    tower, processor = model.vision_model, SiglipImageProcessor()
    native_grid = (facts['image_size'] // facts['patch_size'], ) * 2
    for grid in (native_grid, SMALLER):
        if grid != native_grid:
            state = at_grid(tower.state_dict(), 'embeddings.position_embedding.weight', 0, big_vision_rule(grid))
            config.vision_config.image_size = grid[0] * facts['patch_size']
            tower = SiglipModel(config).vision_model.eval()
            tower.load_state_dict(state)
        x = images(grid, facts['patch_size'])
        native = clip_taps(tower, normalise(x, processor.image_mean, processor.image_std))
        assert error(teacher, native, x, grid) <= TOLERANCE
    receipt = teacher.receipt
    # No class token; layer norm and MLP of the pooling head are 'vision_model.head.'.
    assert (receipt.format, receipt.prefix, receipt.matched) == ('huggingface-clip', 'vision_model.', PLAIN - 1)
    kinds = {name.split('.')[0] for name in receipt.unused if not name.startswith('vision_model.head.')}
    assert kinds == {'text_model', 'logit_scale', 'logit_bias'}


@pytest.mark.parametrize('card, facts', [
    ('clip-vit-b-p32', dict(patch_size=32, image_size=224)), ('clip-vit-b-p16', dict(patch_size=16, image_size=224)),
    ('clip-vit-l-p14', dict(patch_size=14, image_size=224))])
def test_clip__two_towers_of_transformers(card, facts, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    config = CLIPConfig(vision_config={**SIZE, **facts}, projection_dim=32,
                        text_config={**SIZE, 'vocab_size': 11, 'max_position_embeddings': 7})
    model = disturb(CLIPModel(config))
    side = 224 // facts['patch_size']
    path = saved(model, tmp_path, {'vision_model.embeddings.position_ids': torch.arange(side**2 + 1)[None],
                                   'text_model.embeddings.position_ids': torch.arange(7)[None]})
    teacher = load(small_card(card, WIDTH, HEADS), path)
    tower, processor = model.vision_model, CLIPImageProcessor()
    for grid in ((side, side), (5, 5)):
        if grid[0] != side:
            state = at_grid(tower.state_dict(), 'embeddings.position_embedding.weight', 1, antialias_rule(grid))
            config.vision_config.image_size = grid[0] * facts['patch_size']
            tower = CLIPModel(config).vision_model.eval()
            tower.load_state_dict(state)
        x = images(grid, facts['patch_size'])
        native = clip_taps(tower, normalise(x, processor.image_mean, processor.image_std))
        assert error(teacher, native, x, grid) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.format, receipt.prefix, receipt.matched) == ('huggingface-clip', 'vision_model.', PLAIN + 1)
    assert 'vision_model.embeddings.position_ids' in receipt.unused
    kinds = {name.split('.')[0] for name in receipt.unused}
    assert kinds == {'vision_model', 'text_model', 'logit_scale', 'visual_projection', 'text_projection'}


def vit_config(cls, patch, grid, **kwargs):
    # transformers' default of 1e-12 is not the authors' eps.
    return cls(**{**SIZE, **dict(image_size=tuple(side * patch for side in grid), patch_size=patch,
                                 layer_norm_eps=1e-6), **kwargs})


@pytest.mark.parametrize('card, rule, patch', [
    ('augreg-vit-b-p16-in21k', antialias_rule, 16), ('dino-vit-b-p16', dino_rule, 16),
    ('dino-vit-s-p8', dino_rule, 8), ('deit-vit-b-p16', mae_rule, 16)])
@pytest.mark.parametrize('classifier', [False, True])
def test_vit(classifier, card, rule, patch, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel
    native_grid = (224 // patch, ) * 2
    model = disturb((ViTForImageClassification if classifier else ViTModel)(vit_config(ViTConfig, patch, native_grid)))
    teacher = load(small_card(card, WIDTH, HEADS), saved(model, tmp_path))
    vit = model.vit if classifier else model
    for grid in (native_grid, OBLONG):
        state = vit.state_dict()
        if grid != native_grid:
            state = at_grid(state, 'embeddings.position_embeddings', 1, rule(grid))
        native = ViTModel(vit_config(ViTConfig, patch, grid), add_pooling_layer=not classifier).eval()
        native.load_state_dict(state)
        x = images(grid, patch)
        taps = vit_taps(native, normalise(x, *statistics(card)))
        assert error(teacher, taps, x, grid) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.format, receipt.prefix, receipt.matched) == (
        'huggingface-vit', 'vit.' if classifier else '', PLAIN)
    assert sorted(receipt.unused) == (
        ['classifier.bias', 'classifier.weight'] if classifier else ['pooler.dense.bias', 'pooler.dense.weight'])


def statistics(card):
    """Of transformers' constants: its ViT processors default to 0.5, the files of DINO and DeiT carry ImageNet's."""
    from transformers.utils import constants
    if card.startswith('augreg'):
        return constants.IMAGENET_STANDARD_MEAN, constants.IMAGENET_STANDARD_STD
    return constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD


def test_deit__distillation_token(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, DeiTModel
    model = disturb(DeiTForImageClassificationWithTeacher(vit_config(DeiTConfig, 16, (14, 14))))
    teacher = load(small_card('deit-distilled-vit-b-p16', WIDTH, HEADS), saved(model, tmp_path))
    for grid in ((14, 14), OBLONG):
        state = model.deit.state_dict()
        if grid == OBLONG:
            state = at_grid(state, 'embeddings.position_embeddings', 2, mae_rule(grid))
        native = DeiTModel(vit_config(DeiTConfig, 16, grid), add_pooling_layer=False).eval()
        native.load_state_dict(state)
        x = images(grid, 16)
        assert error(teacher, vit_taps(native, normalise(x, *statistics('deit'))), x, grid) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.format, receipt.prefix, receipt.matched) == ('huggingface-vit', 'deit.', PLAIN)
    assert sorted({name.split('.')[0] for name in receipt.unused}) == ['cls_classifier', 'distillation_classifier']


@pytest.mark.parametrize('decoder', [False, True])
def test_vit_mae__encoder_alone_and_with_decoder(decoder, tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
    small = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                 decoder_intermediate_size=64, mask_ratio=0.0)
    model = disturb((ViTMAEForPreTraining if decoder else ViTMAEModel)(vit_config(ViTMAEConfig, 16, (14, 14), **small)))
    teacher = load(small_card('mae-vit-b-p16', WIDTH, HEADS), saved(model, tmp_path))
    for grid in ((14, 14), SMALLER):
        state = (model.vit if decoder else model).state_dict()
        if grid == SMALLER:
            state = at_grid(state, 'embeddings.position_embeddings', 1, mae_rule(grid))
        native = ViTMAEModel(vit_config(ViTMAEConfig, 16, grid, **small))
        native.eval().load_state_dict(state)
        x = images(grid, 16)
        # Noise in ascending order shuffles no patch.
        noise = torch.arange(grid[0] * grid[1], dtype=torch.float32)[None]
        taps = vit_taps(native, normalise(x, *statistics('mae')), noise=noise)
        assert error(teacher, taps, x, grid) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.format, receipt.prefix, receipt.matched) == ('huggingface-vit', 'vit.' if decoder else '', PLAIN)
    assert {name.split('.')[0] for name in receipt.unused} == ({'decoder'} if decoder else set())


@pytest.mark.parametrize('size', 'sblg')
@pytest.mark.parametrize('registers', [0, 4])
def test_dinov2(registers, size, tmp_path):
    import transformers
    name = 'Dinov2WithRegisters' if registers else 'Dinov2'
    config, model = getattr(transformers, f'{name}Config'), getattr(transformers, f'{name}Model')
    extra = dict(num_register_tokens=registers) if registers else {}
    width = 96 if size == 'g' else WIDTH

    def build(grid):
        return model(vit_config(config, 14, grid, hidden_size=width, use_swiglu_ffn=size == 'g', **extra)).eval()

    source = disturb(build((37, 37)))
    teacher = load(small_card(f'dinov2-{"reg4-" if registers else ""}vit-{size}-p14', width, HEADS),
                   saved(source, tmp_path))
    rule = antialias_rule if registers else dino_rule
    for grid in ((37, 37), (16, 16)):
        native, state = build(grid), source.state_dict()
        if grid != (37, 37):
            state = at_grid(state, 'embeddings.position_embeddings', 1, rule(grid))
        native.load_state_dict(state)
        x = images(grid, 14)
        assert error(teacher, vit_taps(native, normalise(x, *statistics('dinov2'))), x, grid) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.format, receipt.prefix, receipt.matched) == ('huggingface-dinov2', '', PLAIN + 3 * 2)
    assert receipt.unused == ['embeddings.mask_token']


@pytest.mark.parametrize('card, wrong', [
    ('siglip-vit-b-p16', dict(activation='gelu')), ('siglip-vit-b-p16', dict(norm_eps=1e-5)),
    ('siglip-vit-b-p16', dict(num_heads=3)), ('siglip-vit-b-p16', dict(mean=CARDS['mae-vit-b-p16'].mean))])
def test_error__shows_every_flag_of_siglip(card, wrong, tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel
    model = disturb(SiglipVisionModel(SiglipVisionConfig(**SIZE)))
    path, grid = saved(model, tmp_path), (14, 14)
    x = images(grid, 16)
    native, right = clip_taps(model.vision_model, normalise(x, [0.5] * 3, [0.5] * 3)), small_card(card, WIDTH, HEADS)
    assert error(load(right, path), native, x, grid) <= TOLERANCE
    assert error(load(dataclasses.replace(right, **wrong), path), native, x, grid) > 10 * TOLERANCE
