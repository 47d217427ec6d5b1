"""Running an ``mmpretrain.VisionTransformer`` for its taps: students and teachers share this one walk."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn

from ..functional import gather_patches, split_heads
from .taps import Taps, ViTOutput, ViTSpec

Recorded = dict[tuple[int, str], Tensor]
# Called before each block with its index and what was tapped so far; returns the patches to go on with, as indices
# (B, K) into those still there, or None for all.
Reducer = Callable[[int, Recorded], Tensor | None]
# Position embedding (1, E + N, C) for a patch grid.
Positions = Callable[[tuple[int, int]], Tensor]
# A block and its input -> its output, and its q, k and v: :func:`run_block`, compiled or checkpointed.
RunBlock = Callable[[nn.Module, Tensor], tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]


def vit_spec(vit: VisionTransformer) -> ViTSpec:
    patch = vit.patch_embed.projection.kernel_size
    return ViTSpec(
        embed_dims=vit.embed_dims,
        depth=vit.num_layers,
        num_heads=vit.arch_settings['num_heads'],
        patch_size=patch[0],
        num_extra_tokens=vit.num_extra_tokens)


def ready_to_compile(vit: VisionTransformer) -> VisionTransformer:
    """mmpretrain's drop path rates are NumPy scalars, which Dynamo takes for data that it cannot branch on."""
    for module in vit.modules():
        if isinstance(module, DropPath):
            module.drop_prob = float(module.drop_prob)
    return vit


def embed(vit: VisionTransformer, images: Tensor,
          positions: Positions | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Tokens before the first block, (B, E + N, C), and the patch grid.

    Position embeddings follow the grid: by ``positions``, else by mmpretrain's rule, bicubic without antialias.
    """
    height, width = images.shape[-2:]
    patch = vit.patch_embed.projection.kernel_size
    if height % patch[0] or width % patch[1]:
        raise ValueError(f'images of {height}x{width} pixels cannot be cut into patches of {patch[0]}x{patch[1]}: '
                         'choose a crop size that is a multiple of the patch size.')
    tokens, grid = vit.patch_embed(images)
    if vit.cls_token is not None:
        tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    grid = tuple(grid)
    tokens = tokens + (positions(grid) if positions else resize_pos_embed(
        vit.pos_embed, vit.patch_resolution, grid, mode=vit.interpolate_mode, num_extra_tokens=vit.num_extra_tokens))
    return vit.pre_norm(vit.drop_after_pos(tokens)), grid


def encode(vit: VisionTransformer, images: Tensor, taps: Taps, reduce: Reducer | None = None,
           positions: Positions | None = None, run: RunBlock | None = None) -> ViTOutput:
    """Run ``vit`` as deep as ``taps`` ask, dropping tokens where ``reduce`` says so. See :mod:`.taps`."""
    tokens, grid = embed(vit, images, positions)
    extra = vit.num_extra_tokens
    recorded: Recorded = {}
    keep_ids, seen = None, {}
    deepest = max(taps)
    for index, block in enumerate(vit.layers[:deepest + 1]):
        local = reduce(index, recorded) if reduce else None
        if local is not None:
            tokens = gather_patches(tokens, local, extra)
            keep_ids = local if keep_ids is None else keep_ids.gather(1, local)
        seen[index] = keep_ids
        kinds = taps.get(index, frozenset())
        if index == deepest and not kinds & {'hidden', 'features'}:
            recorded.update(_project(block, tokens, index, kinds))
            break
        if run or kinds & {'q', 'k', 'v'}:
            tokens, qkv = (run or run_block)(block, tokens)
            recorded.update({(index, kind): x for kind, x in zip('qkv', qkv) if kind in kinds})
        else:
            tokens = block(tokens)
        if 'hidden' in kinds:
            recorded[index, 'hidden'] = tokens
        if 'features' in kinds:
            recorded[index, 'features'] = vit.ln1(tokens)
    return ViTOutput(recorded, extra, grid, seen)


def unused_parameters(vit: VisionTransformer, taps: Taps) -> list[str]:
    """Names of the parameters that get no gradient when only ``taps`` are read."""
    deepest = max(taps)
    ends_early = not taps[deepest] & {'hidden', 'features'}
    unused = []
    for name, _ in vit.named_parameters():
        parts = name.split('.')
        if parts[0] == 'layers':
            index = int(parts[1])
            at_end = index == deepest and ends_early and parts[2] != 'ln1' and parts[2:4] != ['attn', 'qkv']
            if index > deepest or at_end:
                unused.append(name)
        elif parts[0] == 'ln1' and not any('features' in kinds for kinds in taps.values()):
            unused.append(name)
    return unused


def run_block(block: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """``block(x)`` with its q, k, v at hand; the attention itself stays fused."""
    attn = block.attn
    q, k, v = attn.qkv(block.ln1(x)).chunk(3, dim=-1)
    heads = (split_heads(part, attn.num_heads) for part in (q, k, v))
    y = F.scaled_dot_product_attention(*heads, dropout_p=attn.attn_drop if attn.training else 0.0)
    y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
    x = x + attn.out_drop(attn.gamma1(y))
    return block.ffn(block.ln2(x), identity=x), (q, k, v)


def _project(block, x: Tensor, index: int, kinds: frozenset[str]) -> Recorded:
    """The asked of q, k, v alone, where nothing after them is needed: neither the others' share of the product."""
    asked = [i for i, kind in enumerate('qkv') if kind in kinds]
    width = block.attn.embed_dims
    first, last = asked[0], asked[-1] + 1
    rows = slice(first * width, last * width)
    bias = block.attn.qkv.bias
    out = F.linear(block.ln1(x), block.attn.qkv.weight[rows], None if bias is None else bias[rows])
    parts = dict(zip('qkv'[first:last], out.chunk(last - first, dim=-1)))
    return {(index, kind): parts[kind] for kind in kinds}
