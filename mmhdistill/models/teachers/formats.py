"""Checkpoint formats of ViTs, as tables from the keys of ``mmpretrain.VisionTransformer`` to those of a file.

A format is recognised by a key that, among ViTs, only it has; what stands before that key is the prefix under which the
ViT lies in the file (``backbone.``, ``visual.``, ``module.base_encoder.``, ...). Everything outside the prefix is left
aside by name; inside it, only what the format names as no part of the ViT is, so that strict loading refuses the rest.
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """Where a file keeps each tensor of the ViT.

    Attributes:
        marker: a key that, among ViTs, only this format has.
        outer: our module or tensor -> the file's, outside the blocks.
        block: how the file names block ``{}``.
        inner: the same, inside a block. Several names are joined along the first dimension; one that ends in ``_`` is
            followed by ``weight`` or ``bias`` without a dot.
        registers: names of learned tokens that follow the class token.
        aside: beginnings of the keys under the prefix that are no part of the ViT: heads, decoders, mask tokens.
    """

    name: str
    marker: str
    outer: dict[str, str]
    block: str
    inner: dict[str, str | tuple[str, ...]]
    registers: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    synonyms: dict[str, str] = field(default_factory=dict)

    def sources(self, key: str) -> tuple[str, ...]:
        """The file's names, without prefix, of what ``key`` of ``mmpretrain.VisionTransformer`` is made of."""
        table, before, inner, module = self._find(key)
        if module is None:
            return (before + inner, )  # a part that no file of this format has
        names = table[module]
        suffix = inner.removeprefix(module)
        return tuple(before + name + (suffix.removeprefix('.') if name.endswith('_') else suffix)
                     for name in ((names,) if isinstance(names, str) else names))

    def has(self, key: str) -> bool:
        """Whether files of this format have a place for ``key`` of ``mmpretrain.VisionTransformer``."""
        return self._find(key)[-1] is not None

    def _find(self, key: str) -> tuple[dict, str, str, str | None]:
        table, before, inner = self.outer, '', key
        if key.startswith('layers.'):
            _, index, inner = key.split('.', 2)
            table, before = self.inner, self.block.format(index)
        return table, before, inner, next((m for m in (inner, inner.rpartition('.')[0]) if m in table), None)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_TIMM_OUTER = {'cls_token': 'cls_token', 'pos_embed': 'pos_embed', 'patch_embed.projection': 'patch_embed.proj',
               'pre_norm': 'norm_pre', 'ln1': 'norm'}
_TIMM_BLOCK = {'ln1': 'norm1', 'ln2': 'norm2', 'attn.qkv': 'attn.qkv', 'attn.proj': 'attn.proj',
               'ffn.layers.0.0': 'mlp.fc1', 'ffn.layers.1': 'mlp.fc2', 'ffn.w12': 'mlp.w12', 'ffn.w3': 'mlp.w3',
               'attn.gamma1.weight': 'ls1.gamma', 'ffn.gamma2.weight': 'ls2.gamma'}
_CLIP_BLOCK = {'ln1': 'ln_1', 'ln2': 'ln_2', 'attn.qkv': 'attn.in_proj_', 'attn.proj': 'attn.out_proj',
               'ffn.layers.0.0': 'mlp.c_fc', 'ffn.layers.1': 'mlp.c_proj'}
_HF_CLIP_BLOCK = {'ln1': 'layer_norm1', 'ln2': 'layer_norm2', 'attn.proj': 'self_attn.out_proj',
                  'attn.qkv': tuple(f'self_attn.{part}_proj' for part in 'qkv'),
                  'ffn.layers.0.0': 'mlp.fc1', 'ffn.layers.1': 'mlp.fc2'}
_HF_ATTENTION = {'attn.qkv': tuple(f'attention.attention.{part}' for part in ('query', 'key', 'value')),
                 'attn.proj': 'attention.output.dense'}
_HF_VIT_OUTER = {'cls_token': 'embeddings.cls_token', 'pos_embed': 'embeddings.position_embeddings',
                 'patch_embed.projection': 'embeddings.patch_embeddings.projection', 'ln1': 'layernorm'}
_HF_VIT = dict(marker='embeddings.patch_embeddings.projection.weight', outer=_HF_VIT_OUTER, block='encoder.layer.{}.',
               registers=('embeddings.register_tokens', 'embeddings.distillation_token'),
               aside=('embeddings.mask_token', 'pooler.'))

FORMATS = (
    Format('mmpretrain', 'patch_embed.projection.weight',
           _same('cls_token', 'pos_embed', 'patch_embed.projection', 'pre_norm', 'ln1'), 'layers.{}.',
           _same('ln1', 'ln2', 'attn.qkv', 'attn.proj', 'attn.gamma1', 'ffn.layers.0.0', 'ffn.layers.1', 'ffn.w12',
                 'ffn.w3', 'ffn.gamma2'), aside=('mask_token',)),
    # MAE (with or without its decoder), DINO, DINOv2, DeiT, DeiT-III, MoCo v3 and timm share these names.
    Format('timm', 'patch_embed.proj.weight', _TIMM_OUTER, 'blocks.{}.', _TIMM_BLOCK,
           registers=('register_tokens', 'reg_token', 'dist_token'),
           aside=('head.', 'head_dist.', 'fc_norm.', 'attn_pool.', 'decoder_', 'mask_token', 'masked_embed'),
           synonyms={'ls1.gamma': 'gamma_1', 'ls2.gamma': 'gamma_2'}),
    Format('openai-clip', 'ln_pre.weight',
           {'cls_token': 'class_embedding', 'pos_embed': 'positional_embedding', 'patch_embed.projection': 'conv1',
            'pre_norm': 'ln_pre', 'ln1': 'ln_post'}, 'transformer.resblocks.{}.', _CLIP_BLOCK, aside=('proj',)),
    Format('huggingface-clip', 'embeddings.patch_embedding.weight',
           {'cls_token': 'embeddings.class_embedding', 'pos_embed': 'embeddings.position_embedding.weight',
            'patch_embed.projection': 'embeddings.patch_embedding', 'pre_norm': 'pre_layrnorm',
            'ln1': 'post_layernorm'}, 'encoder.layers.{}.', _HF_CLIP_BLOCK,
           aside=('embeddings.position_ids', 'head.')),
    Format('huggingface-dinov2', inner={
        **_HF_ATTENTION, 'ln1': 'norm1', 'ln2': 'norm2', 'ffn.layers.0.0': 'mlp.fc1', 'ffn.layers.1': 'mlp.fc2',
        'ffn.w12': 'mlp.weights_in', 'ffn.w3': 'mlp.weights_out', 'attn.gamma1.weight': 'layer_scale1.lambda1',
        'ffn.gamma2.weight': 'layer_scale2.lambda1'}, **{**_HF_VIT, 'marker': 'encoder.layer.0.layer_scale1.lambda1'}),
    Format('huggingface-vit', inner={
        **_HF_ATTENTION, 'ln1': 'layernorm_before', 'ln2': 'layernorm_after', 'ffn.layers.0.0': 'intermediate.dense',
        'ffn.layers.1': 'output.dense'}, **_HF_VIT),
)

# Where a file holds the ViT more than once, the authors' own choice; others are chosen by name.
_PREFERRED = ('', 'backbone.', 'module.base_encoder.')


def recognise(names: Iterable[str], prefix: str | None = None) -> tuple[Format, str]:
    """The format of a file's keys and the prefix under which the ViT lies in them.

    Raises:
        ValueError: no format, or several ViTs and no ``prefix`` to choose one.
    """
    names = list(names)
    found = {}
    for fmt in FORMATS:
        for name in names:
            before = name.removesuffix(fmt.marker)
            if name.endswith(fmt.marker) and (before == '' or before.endswith('.')) and _has_block(fmt, before, names):
                found.setdefault(before, fmt)
    if prefix is not None and prefix not in found:
        raise ValueError(f"holds no ViT under the prefix '{prefix}'" + (
            f', but under {", ".join(map(repr, found))}: correct prefix=...' if found else ', nor anywhere else.'))
    if not found:
        formats = ', '.join(fmt.name for fmt in FORMATS)
        raise ValueError(f'is in no known format: expected the keys of one of {formats}; '
                         f'found {", ".join(names[:3])}, ...')
    chosen = [prefix] if prefix is not None else list(found)
    if len(chosen) > 1:
        chosen = [p for p in _PREFERRED if p in found][:1] or chosen
    if len(chosen) > 1:
        raise ValueError(f'holds {len(found)} ViTs, under {", ".join(found)}: choose one with prefix=...')
    return found[chosen[0]], chosen[0]


def _has_block(fmt: Format, prefix: str, names: list[str]) -> bool:
    """Swin and its kin share the patch embedding's key and have stages of blocks."""
    return any(name.startswith(prefix + fmt.block.format(0)) for name in names)


@dataclass
class Plan:
    """What to read for each tensor of the ViT, and what does not fit.

    Attributes:
        sources: our key -> the file's keys.
        missing: expected of the file, by the file's names.
        unexpected: inside the prefix, and no part of the ViT as the card describes it.
        aside: no part of any ViT, or outside the prefix.
    """

    sources: dict[str, tuple[str, ...]]
    missing: list[str]
    unexpected: list[str]
    aside: list[str]

    @property
    def used(self) -> list[str]:
        return [name for group in self.sources.values() for name in group]


def plan(fmt: Format, prefix: str, names: Iterable[str], keys: Iterable[str], registers: int = 0) -> Plan:
    """Match ``keys`` of a ``mmpretrain.VisionTransformer`` to the ``names`` of a file; a pure function of names."""
    names = set(names)
    there = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    sources = {}
    for key in keys:
        found = tuple(_synonym(fmt, name, there) for name in fmt.sources(key))
        if key == 'cls_token' and registers:
            found += tuple(name for name in fmt.registers if name in there) or fmt.registers[:1]
        sources[key] = found
    used = {name for group in sources.values() for name in group}
    rest = sorted(there - used)
    outside = sorted(name for name in names if not name.startswith(prefix))
    return Plan({key: tuple(prefix + name for name in group) for key, group in sources.items()},
                missing=[prefix + name for group in sources.values() for name in group if name not in there],
                unexpected=[prefix + name for name in rest if not name.startswith(fmt.aside)],
                aside=[prefix + name for name in rest if fmt.aside and name.startswith(fmt.aside)] + outside)


def assemble(key: str, parts: list[Tensor], num_extra_tokens: int) -> Tensor:
    """One tensor of the ViT from its parts in the file.

    Tokens and positions become (1, n, C). A file may lack the positions of extra tokens (DeiT-III of all, DINOv2 of the
    registers), which are then zero: what its grid is too many for a square are those that it has.
    """
    if key in ('cls_token', 'pos_embed'):
        parts = [part.reshape(1, -1, part.shape[-1]) for part in parts]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if key == 'cls_token' else 0)
    if key == 'pos_embed':
        length = tensor.shape[1]
        slots = length - math.isqrt(length)**2
        if slots < num_extra_tokens:
            zeros = tensor.new_zeros(1, num_extra_tokens - slots, tensor.shape[-1])
            tensor = torch.cat([tensor[:, :slots], zeros, tensor[:, slots:]], dim=1)
    return tensor


def _synonym(fmt: Format, name: str, there: set[str]) -> str:
    if name not in there:
        for usual, other in fmt.synonyms.items():
            if name.endswith(usual) and name.removesuffix(usual) + other in there:
                return name.removesuffix(usual) + other
    return name
