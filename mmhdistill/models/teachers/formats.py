"""Checkpoint formats of ViTs: pure functions from a file's own keys to those of ``mmpretrain.VisionTransformer``.

A format is recognised by a key that only it has. A conversion returns the renamed tensors and the names that it left
aside: heads, decoders and text encoders, which the ViT has no place for. Anything else in the file is passed on, so
that strict loading refuses it.
"""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

StateDict = dict[str, Tensor]

_TIMM_BLOCK = {
    'norm1': 'ln1', 'norm2': 'ln2', 'attn.qkv': 'attn.qkv', 'attn.proj': 'attn.proj', 'mlp.fc1': 'ffn.layers.0.0',
    'mlp.fc2': 'ffn.layers.1'
}
_CLIP_BLOCK = {
    'ln_1': 'ln1', 'ln_2': 'ln2', 'attn.in_proj': 'attn.qkv', 'attn.out_proj': 'attn.proj',
    'mlp.c_fc': 'ffn.layers.0.0', 'mlp.c_proj': 'ffn.layers.1'
}


def from_mmpretrain(state: StateDict) -> tuple[StateDict, list[str]]:
    """A bare backbone, or any model with one under ``backbone.``."""
    if 'backbone.patch_embed.projection.weight' not in state:
        return dict(state), []
    ours = {name.removeprefix('backbone.'): x for name, x in state.items() if name.startswith('backbone.')}
    return ours, [name for name in state if not name.startswith('backbone.')]


def from_timm(state: StateDict) -> tuple[StateDict, list[str]]:
    """timm's names, which MAE (with or without its decoder), DINO and DeiT share."""
    outer = {'cls_token': 'cls_token', 'pos_embed': 'pos_embed', 'norm': 'ln1',
             'patch_embed.proj': 'patch_embed.projection'}
    return _rename(state, outer, 'blocks.', _TIMM_BLOCK, ('head.', 'decoder_', 'mask_token'))


def from_moco_v3(state: StateDict) -> tuple[StateDict, list[str]]:
    """MoCo v3's training file: the base encoder is the student, the momentum encoder and the heads are left aside."""
    prefix = 'module.base_encoder.'
    ours, aside = from_timm({name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)})
    return ours, [prefix + name for name in aside] + [name for name in state if not name.startswith(prefix)]


def from_openai_clip(state: StateDict) -> tuple[StateDict, list[str]]:
    """OpenAI's CLIP: the visual tower without its output projection."""
    visual = {name.removeprefix('visual.'): x.float() for name, x in state.items() if name.startswith('visual.')}
    ours, aside = _rename(
        visual,
        dict(class_embedding='cls_token', positional_embedding='pos_embed', conv1='patch_embed.projection',
             ln_pre='pre_norm', ln_post='ln1'), 'transformer.resblocks.', _CLIP_BLOCK, ('proj',))
    for name, shape in (('cls_token', (1, 1, -1)), ('pos_embed', (1, -1, ours['pos_embed'].shape[-1]))):
        ours[name] = ours[name].reshape(shape)
    return ours, [f'visual.{name}' for name in aside] + [name for name in state if not name.startswith('visual.')]


@dataclass(frozen=True)
class Format:
    name: str
    markers: tuple[str, ...]
    convert: Callable[[StateDict], tuple[StateDict, list[str]]]


FORMATS = (
    Format('mmpretrain', ('patch_embed.projection.weight', 'backbone.patch_embed.projection.weight'), from_mmpretrain),
    Format('openai-clip', ('visual.transformer.resblocks.0.ln_1.weight',), from_openai_clip),
    Format('moco-v3', ('module.base_encoder.patch_embed.proj.weight',), from_moco_v3),
    Format('timm', ('blocks.0.norm1.weight',), from_timm),
)


def recognise(state: StateDict) -> Format | None:
    return next((fmt for fmt in FORMATS if any(marker in state for marker in fmt.markers)), None)


def _rename(state: StateDict, outer: dict[str, str], block_prefix: str, block: dict[str, str],
            aside: tuple[str, ...]) -> tuple[StateDict, list[str]]:
    """Rename by module: ``outer`` outside the blocks, ``block`` inside ``<block_prefix>N.``; names starting with one of
    ``aside`` are left out."""
    ours, left = {}, []
    for name, tensor in state.items():
        table, prefix, inner = outer, '', name
        if name.startswith(block_prefix):
            index, inner = name.removeprefix(block_prefix).split('.', 1)
            table, prefix = block, f'layers.{index}.'
        module = next((m for m in table if inner == m or inner.startswith((f'{m}.', f'{m}_'))), None)
        if module is not None:
            # in_proj_weight (nn.MultiheadAttention) joins its parameter with an underscore.
            suffix = inner.removeprefix(module).replace('_', '.', 1) if inner != module else ''
            ours[prefix + table[module] + suffix] = tensor
        elif not prefix and inner.startswith(aside):
            left.append(name)
        else:
            ours[name] = tensor
    return ours, left
