"""Attention maps and what they show of a model's diversity ("What Do Self-Supervised ViTs Learn?", ICLR 2023)."""
import torch
from torch import Tensor

from .relation import split_heads, token_relation

# Numbers of a block of rows of the map in float64, 16 MiB.
_BLOCK = 2**21
_EPS = 1e-8


def attention_from_qk(q: Tensor, k: Tensor, heads: int, num_extra_tokens: int = 0) -> Tensor:
    """Attention among the patch tokens, (B, heads, N, N) in float64, rows summing to 1.

    The softmax is over the patches: the same as to drop the extra tokens' columns after it and renormalise the rows,
    but for what a sink would swallow. Attention metrics need float64: a map with one-key sinks otherwise shows a false
    1e-5.

    Args:
        q, k: (B, E + N, C), extra tokens first.
    """
    q, k = (x[:, num_extra_tokens:].double() for x in (q, k))
    return token_relation(q, k, heads).softmax(dim=-1)


def attention_nmi(attention: Tensor) -> Tensor:
    """Normalised mutual information of queries and keys, per head: (B, H, N, N) -> (H,), mean over images.

    With p(q) = 1/N and p(k) = sum_q A_qk p(q): I(q; k) / sqrt(H(q) H(k)). 0 where every query attends alike (attention
    collapse), 1 where every query attends to a key of its own. It needs at least two queries.
    """
    _check_queries(attention.shape[-2])
    attention = attention.double() + _EPS
    attention = attention / attention.sum(dim=-1, keepdim=True)
    num_queries = attention.shape[-2]
    keys = attention.mean(dim=-2, keepdim=True)
    information = (attention * (attention / keys).log()).sum(dim=(-2, -1)) / num_queries
    entropy_keys = -(keys * keys.log()).sum(dim=(-2, -1))
    entropy_queries = attention.new_tensor(float(num_queries)).log()
    return (information / (entropy_queries * entropy_keys).sqrt()).mean(dim=0)


def attention_distance(attention: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """How far attention reaches, in pixels, per head: (B, H, N, N) -> (H,), mean over queries and images.

    The distance of the centres of query's and key's patch, weighted by attention: sum_j A_ij patch_size |x_i - x_j|.

    Args:
        grid: rows and columns of the N patches.
    """
    centres = _centres(grid, attention, attention.shape[-1])
    return patch_size * (attention.double() * torch.cdist(centres, centres)).sum(dim=-1).mean(dim=(0, 2))


def attention_statistics(q: Tensor, k: Tensor, heads: int, grid: tuple[int, int], patch_size: int,
                         num_extra_tokens: int = 0, rows: int | None = None) -> dict[str, Tensor]:
    """:func:`attention_nmi` and :func:`attention_distance` of one layer, of whose map some rows exist at a time.

    I(q; k) = H(k) - mean_q H(A_q), so that one pass over the rows gathers all.

    Args:
        q, k: (B, E + N, C), extra tokens first.
        rows: queries at a time; chosen from the problem's size if None.

    Returns:
        ``nmi`` and ``distance``, each (H,) in float64.
    """
    q, k = (split_heads(x[:, num_extra_tokens:].double(), heads) for x in (q, k))
    q = q * q.shape[-1]**-0.5
    batch, _, patches, _ = q.shape
    _check_queries(patches)
    centres = _centres(grid, q, patches)
    keys, entropy, distance = q.new_zeros(batch, heads, patches), q.new_zeros(batch, heads), q.new_zeros(heads)
    rows = rows or max(1, _BLOCK // (batch * heads * patches))
    for part, places in zip(q.split(rows, dim=2), centres.split(rows)):
        attention = (part @ k.transpose(-1, -2)).softmax(dim=-1)
        distance += (attention * torch.cdist(places, centres)).sum(dim=(0, 2, 3))
        attention += _EPS
        attention /= attention.sum(dim=-1, keepdim=True)
        keys += attention.sum(dim=-2)
        entropy += torch.special.entr(attention).sum(dim=(-2, -1))
    entropy_keys = torch.special.entr(keys / patches).sum(dim=-1)
    entropy_queries = q.new_tensor(float(patches)).log()
    nmi = (entropy_keys - entropy / patches) / (entropy_queries * entropy_keys).sqrt()
    return dict(nmi=nmi.mean(dim=0), distance=patch_size * distance / (batch * patches))


def _check_queries(count: int) -> None:
    if count < 2:
        raise ValueError(f'mutual information of queries and keys needs at least 2 patches, got {count}: give larger '
                         'images.')


def _centres(grid: tuple[int, int], like: Tensor, patches: int) -> Tensor:
    """(N, 2) in patches, row by row."""
    if len(grid) != 2 or grid[0] * grid[1] != patches:
        raise ValueError(f'a grid of {grid} rows and columns does not have the {patches} patches that attention is '
                         'among: give the rows and columns of the patches, without extra tokens.')
    sides = (torch.arange(side, dtype=torch.float64, device=like.device) for side in grid)
    return torch.cartesian_prod(*sides)
