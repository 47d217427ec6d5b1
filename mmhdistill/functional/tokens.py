"""Keeping and dropping patch tokens: counts, selection, gather and scatter."""
import math

import torch
from torch import Tensor


def kept_counts(num_tokens: int, keep_rate: float, stages: list[int], round_to: int | None = None) -> list[int]:
    """K_s = max(1, floor(N r^s + 1/2)) for each exponent s in ``stages`` [choice].

    Args:
        num_tokens: N, the patches of the full image.
        keep_rate: r in (0, 1], the fraction that each stage keeps.
        stages: exponents, (1, 2, 3) for ``input`` masking and (0, 1, 2) for ``encoder`` masking of three stages.
        round_to: round every count up to a multiple of it (at most N), for kernels that prefer round sizes.
    """
    check_keep_rate(keep_rate)
    counts = [max(1, math.floor(num_tokens * keep_rate**s + 0.5)) for s in stages]
    if round_to:
        counts = [min(num_tokens, math.ceil(k / round_to) * round_to) for k in counts]
    return counts


def check_keep_rate(keep_rate: float) -> None:
    if not 0 < keep_rate <= 1:
        raise ValueError(f'the keep rate must lie in (0, 1], got {keep_rate}: 1 keeps every token, 0.7 drops 30 % of '
                         'them at each stage.')


def least_redundant(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest scores of each row, in ascending order of index: (B, K) -> (B, count).

    The sort is stable, so that equal scores are resolved by position and a mask is reproducible.
    """
    order = torch.argsort(scores, dim=1, stable=True)
    return order[:, :count].sort(dim=1).values


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` (B, K) of x (B, N, C): (B, K, C)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def gather_patches(x: Tensor, ids: Tensor, num_extra_tokens: int) -> Tensor:
    """Patches ``ids`` (B, K) of x (B, E + N, C), behind all of its E extra tokens: (B, E + K, C)."""
    return torch.cat([x[:, :num_extra_tokens], gather_tokens(x[:, num_extra_tokens:], ids)], dim=1)


def dropped_ids(keep_ids: Tensor, num_tokens: int) -> Tensor:
    """What ``keep_ids`` (B, K) leaves out of ``num_tokens``, in ascending order: (B, num_tokens - K)."""
    kept = torch.zeros(len(keep_ids), num_tokens, dtype=torch.bool, device=keep_ids.device).scatter_(1, keep_ids, True)
    # The sort is stable: dropped ones come first, in order.
    return kept.to(torch.uint8).sort(dim=1, stable=True).indices[:, :num_tokens - keep_ids.shape[1]]


def scatter_tokens(x: Tensor, ids: Tensor, num_tokens: int, fill: float = 0.0) -> Tensor:
    """Inverse of :func:`gather_tokens`: x (B, K, C) at rows ``ids`` of a (B, num_tokens, C) tensor of ``fill``."""
    full = x.new_full((x.shape[0], num_tokens, x.shape[2]), fill)
    return full.scatter(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x)
