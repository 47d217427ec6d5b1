"""Arithmetic of ViTs: what a forward costs, counted from the weights it multiplies by."""
from collections.abc import Iterable, Sequence

from torch import nn

from .taps import Taps


def encoder_flops(stem: nn.Module, blocks: Iterable[nn.Module], width: int, patches: int, tokens: Sequence[int],
                  taps: Taps) -> int:
    """Multiplications and additions of one image's forward: linear layers and attention, two per multiply-add.

    Args:
        stem: patch embedding.
        width: C of the attention.
        patches: patches of the full image.
        tokens: tokens, with the extra ones, that each block sees.
        taps: what is read; nothing runs behind it.
    """
    deepest = max(taps)
    flops = 2 * patches * sum(p.numel() for p in stem.parameters() if p.ndim == 4)
    for index, (block, count) in enumerate(zip(blocks, tokens)):
        if index == deepest and not taps[index] & {'hidden', 'features'}:
            asked = [i for i, kind in enumerate('qkv') if kind in taps[index]]
            return flops + 2 * count * (asked[-1] - asked[0] + 1) * width**2
        flops += 2 * count * sum(p.numel() for p in block.parameters() if p.ndim == 2) + 4 * count**2 * width
        if index == deepest:
            break
    return flops
