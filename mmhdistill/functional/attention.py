"""Attention maps and what they show of a model's diversity ("What Do Self-Supervised ViTs Learn?", ICLR 2023)."""
import torch
from torch import Tensor

from .relation import split_heads, token_relation

# Numbers of a block of rows of the map in float64, 16 MiB.
_BLOCK = 2**21
_EPS = 1e-8


def attention_from_qk(q: Tensor, k: Tensor, heads: int, num_extra_tokens: int = 0) -> Tensor:
    """Attention among the patch tokens, (B, heads, N, N) in float64, rows summing to 1.

    Rows and columns of the extra tokens are dropped after the softmax and the rows renormalised. Attention metrics
    need float64: a map with one-key sinks otherwise shows a false 1e-5.

    Args:
        q, k: (B, E + N, C), extra tokens first.
    """
    attention = token_relation(q.double(), k.double(), heads).softmax(dim=-1)
    attention = attention[..., num_extra_tokens:, num_extra_tokens:]
    return attention / attention.sum(dim=-1, keepdim=True)


def attention_nmi(attention: Tensor) -> Tensor:
    """Normalised mutual information of queries and keys, per head: (B, H, N, N) -> (H,), mean over images.

    With p(q) = 1/N and p(k) = sum_q A_qk p(q): I(q; k) / sqrt(H(q) H(k)). 0 where every query attends alike (attention
    collapse), 1 where every query attends to a key of its own.
    """
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
    centres = _centres(grid, attention)
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
    q, k = (split_heads(x.double(), heads) for x in (q, k))
    q = q[..., num_extra_tokens:, :] * q.shape[-1]**-0.5
    batch, _, patches, _ = q.shape
    centres = _centres(grid, q)
    keys, entropy, distance = q.new_zeros(batch, heads, patches), q.new_zeros(batch, heads), q.new_zeros(heads)
    rows = rows or max(1, _BLOCK // (batch * heads * k.shape[2]))
    for part, places in zip(q.split(rows, dim=2), centres.split(rows)):
        attention = (part @ k.transpose(-1, -2)).softmax(dim=-1)[..., num_extra_tokens:]
        attention /= attention.sum(dim=-1, keepdim=True)
        distance += (attention * torch.cdist(places, centres)).sum(dim=(0, 2, 3))
        attention += _EPS
        attention /= attention.sum(dim=-1, keepdim=True)
        keys += attention.sum(dim=-2)
        entropy += torch.special.entr(attention).sum(dim=(-2, -1))
    entropy_keys = torch.special.entr(keys / patches).sum(dim=-1)
    entropy_queries = q.new_tensor(float(patches)).log()
    nmi = (entropy_keys - entropy / patches) / (entropy_queries * entropy_keys).sqrt()
    return dict(nmi=nmi.mean(dim=0), distance=patch_size * distance / (batch * patches))


def _centres(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(N, 2) in patches, row by row."""
    sides = (torch.arange(side, dtype=torch.float64, device=like.device) for side in grid)
    return torch.cartesian_prod(*sides)
