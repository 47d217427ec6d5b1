"""Files of OpenAI's CLIP and of open_clip, against open_clip's own models of their weights."""
import copy
import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from .native import (
    DEPTH,
    OBLONG,
    TOLERANCE,
    big_vision_rule,
    disturb,
    error,
    images,
    load,
    multi_head_taps,
    normalise,
    resize,
    small_card,
    timm_taps,
)

# open_clip gives OpenAI's models a head for every 64 channels.
WIDTH, HEADS = 128, 2
TEXT = dict(context_length=7, vocab_size=11, width=64, heads=1, layers=2)
# 12 tensors in each of 3 blocks; class token, positions, weight of the patch embedding, 2 of each outer norm.
MATCHED = 3 * 12 + 7


class Native:
    """A small open_clip model of a published name and tag."""

    def __init__(self, name, tag):
        import open_clip
        self.lib = open_clip
        self.vision = {**open_clip.get_model_config(name)['vision_cfg'], 'width': WIDTH, 'layers': DEPTH}
        self.facts = open_clip.get_pretrained_cfg(name, tag)
        self.patch = self.vision['patch_size']
        self.grid = (self.vision['image_size'] // self.patch, ) * 2
        self.model = disturb(self._create())

    def _create(self, **kwargs):
        return self.lib.model.CLIP(32, {**self.vision, **kwargs}, TEXT,
                                   quick_gelu=self.facts.get('quick_gelu', False)).eval()

    def taps(self, x, grid):
        """Of images in 0-1; open_clip itself resamples the positions."""
        model = self._create(image_size=tuple(side * self.patch for side in grid))
        state = self.model.state_dict()
        self.lib.model.resize_pos_embed(state, model)
        model.load_state_dict(state)
        return multi_head_taps(model.visual, normalise(x, self.facts['mean'], self.facts['std']))


class OpenAI(Native):
    """Built by open_clip from OpenAI's state dict in half precision, as it loads their files."""

    def __init__(self, name):
        super().__init__(name, 'openai')
        for key, value in (('input_resolution', self.vision['image_size']), ('context_length', 7), ('vocab_size', 11)):
            vars(self.model).pop(key, None)
            self.model.register_buffer(key, torch.tensor(value))
        self.original = copy.deepcopy(self.model)
        self.published = {key: x.half() if x.is_floating_point() else x for key, x in self.model.state_dict().items()}
        self.model = self.lib.model.build_model_from_openai_state_dict(dict(self.published)).float()


def compare(native, card, path, **kwargs):
    teacher = load(small_card(card, WIDTH, HEADS), path, **kwargs)
    for grid in (native.grid, OBLONG):
        x = images(grid, native.patch)
        assert error(teacher, native.taps(x, grid), x, grid) <= TOLERANCE
    return teacher


OPENAI = pytest.mark.parametrize('card, name', [
    ('clip-vit-b-p32', 'ViT-B-32'), ('clip-vit-b-p16', 'ViT-B-16'), ('clip-vit-l-p14', 'ViT-L-14'),
    ('clip-vit-l-p14-336', 'ViT-L-14-336')])
# The text tower's blocks and its four other tensors, the projections, the temperature, three sizes.
OPENAI_ASIDE = 2 * 12 + 4 + 2 + 1 + 3


@OPENAI
def test_openai__state_dict_in_half_precision(card, name, tmp_path):
    native = OpenAI(name)
    torch.save(native.published, tmp_path / 'clip.pt')
    teacher = compare(native, card, tmp_path / 'clip.pt')
    receipt = teacher.receipt
    assert (receipt.format, receipt.prefix, receipt.matched) == ('openai-clip', 'visual.', MATCHED)
    assert receipt.dtype == 'float16 in the file, float32 in memory'
    assert {p.dtype for p in teacher.vit.parameters()} == {torch.float32}
    assert len(receipt.unused) == OPENAI_ASIDE
    assert 'visual.proj' in receipt.unused


@OPENAI
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('how', ['trace', 'script'])
def test_openai__torchscript_archive_in_half_precision(how, card, name, tmp_path):
    native = OpenAI(name)
    side = native.vision['image_size']
    inputs = torch.rand(1, 3, side, side), torch.arange(7)[None]
    archive = (torch.jit.trace(native.original, inputs, check_trace=False) if how == 'trace'
               else torch.jit.script(native.original))
    archive.half().save(tmp_path / f'{name}.pt')
    receipt = compare(native, card, tmp_path / f'{name}.pt').receipt
    assert (receipt.format, receipt.prefix, receipt.entry, receipt.matched) == ('openai-clip', 'visual.', '', MATCHED)
    # The mask of the text tower is an attribute of the archive too.
    assert sorted(receipt.unused) == sorted(
        {name for name in native.published if not name.startswith('visual.')} | {'visual.proj', 'attn_mask'})


OPEN_CLIP = pytest.mark.parametrize('card, name, tag', [
    ('openclip-vit-b-p16-datacomp', 'ViT-B-16', 'datacomp_xl_s13b_b90k'),
    ('openclip-vit-b-p16-laion400m', 'ViT-B-16', 'laion400m_e32'),
    ('openclip-vit-l-p14-laion400m', 'ViT-L-14', 'laion400m_e32'),
    ('openclip-vit-l-p14-laion2b', 'ViT-L-14', 'laion2b_s32b_b82k')])


@OPEN_CLIP
@pytest.mark.parametrize('kind', ['bin', 'safetensors', 'training'])
def test_open_clip(kind, card, name, tag, tmp_path):
    native = Native(name, tag)
    state = native.model.state_dict()
    prefix, entry, path = 'visual.', '', tmp_path / f'open_clip_pytorch_model.{kind}'
    if kind == 'safetensors':
        save_file(state, path)
    elif kind == 'bin':
        torch.save(state, path)
    else:
        prefix, entry, path = 'module.visual.', 'state_dict', tmp_path / 'epoch_32.pt'
        torch.save({'epoch': 32, 'name': 'run', 'state_dict': {f'module.{key}': x for key, x in state.items()},
                    'optimizer': {'state': {}, 'param_groups': []}, 'scaler': {'scale': 1.0}}, path)
    receipt = compare(native, card, path).receipt
    assert (receipt.format, receipt.prefix, receipt.entry, receipt.matched) == ('openai-clip', prefix, entry, MATCHED)
    # As of OpenAI, without the three sizes; four more entries of a training.
    assert len(receipt.unused) == OPENAI_ASIDE - 3 + 4 * (kind == 'training')


@pytest.mark.parametrize('prefix', ['visual.trunk.', 'module.visual.trunk.'])
def test_open_clip__siglip_whose_tower_is_timm(prefix, tmp_path):
    import open_clip
    import timm
    # As big_vision and transformers have it; timm's SigLIP has the exact GELU, 3e-4 away.
    name, dims = 'vit_base_patch16_siglip_224', dict(embed_dim=48, depth=DEPTH, num_heads=4, num_classes=0,
                                                     act_layer='gelu_tanh')
    config = open_clip.get_model_config('ViT-B-16-SigLIP')
    assert config['vision_cfg']['timm_model_name'] == name
    # Without memory, as the tower is exchanged for a small one.
    with torch.device('meta'):
        model = open_clip.CustomTextCLIP(48, config['vision_cfg'], {**config['text_cfg'], **TEXT}, init_logit_bias=-10)
    model.visual.trunk = disturb(timm.create_model(name, **dims))
    torch.save({'state_dict': {prefix.removesuffix('visual.trunk.') + key: torch.ones(x.shape) if x.is_meta else x
                               for key, x in model.state_dict().items()}}, tmp_path / 'open_clip.pt')
    teacher = load(small_card('siglip-vit-b-p16', 48, 4), tmp_path / 'open_clip.pt')
    facts = open_clip.get_pretrained_cfg('ViT-B-16-SigLIP', 'webli')
    for grid in ((14, 14), OBLONG):
        state = model.visual.trunk.state_dict()
        if grid != (14, 14):
            state['pos_embed'] = resize(state['pos_embed'], 0, big_vision_rule(grid))
        native = timm.create_model(name, img_size=tuple(16 * side for side in grid), **dims).eval()
        native.load_state_dict(state)
        x = images(grid, 16)
        assert error(teacher, timm_taps(native, normalise(x, facts['mean'], facts['std'])), x, grid) <= TOLERANCE
    receipt = teacher.receipt
    # No class token.
    assert (receipt.format, receipt.prefix, receipt.matched) == ('timm', prefix, 3 * 12 + 5)
    assert f'{prefix}attn_pool.latent' in receipt.unused


@pytest.mark.parametrize('grid, wrong', [
    ((14, 14), dict(norm_eps=1e-6)), ((14, 14), dict(activation='gelu')), ((14, 14), dict(num_heads=4)),
    ((14, 14), dict(mean=(127.5, ) * 3)), ((14, 14), dict(std=(127.5, ) * 3)), (OBLONG, dict(resampling='bicubic')),
    (OBLONG, dict(resampling='bicubic-offset')), (OBLONG, dict(resampling='bilinear-corners'))])
def test_error__shows_every_flag_of_a_card_that_shapes_do_not(grid, wrong, tmp_path):
    native = OpenAI('ViT-B-16')
    torch.save(native.published, tmp_path / 'clip.pt')
    card, x = small_card('clip-vit-b-p16', WIDTH, HEADS), images(grid, 16)
    expected = native.taps(x, grid)
    assert error(load(card, tmp_path / 'clip.pt'), expected, x, grid) <= TOLERANCE
    wrong = dataclasses.replace(card, **wrong)
    assert error(load(wrong, tmp_path / 'clip.pt'), expected, x, grid) > 10 * TOLERANCE
