"""Attention maps and what they show of a model's diversity ("What Do Self-Supervised ViTs Learn?", ICLR 2023)."""
import torch
from torch import Tensor

from .relation import token_relation


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
    attention = attention.double() + 1e-8
    attention = attention / attention.sum(dim=-1, keepdim=True)
    num_queries = attention.shape[-2]
    keys = attention.mean(dim=-2, keepdim=True)
    information = (attention * (attention / keys).log()).sum(dim=(-2, -1)) / num_queries
    entropy_keys = -(keys * keys.log()).sum(dim=(-2, -1))
    entropy_queries = torch.tensor(float(num_queries), dtype=torch.float64).log()
    return (information / (entropy_queries * entropy_keys).sqrt()).mean(dim=0)
