"""Redundancy of patch tokens: the higher the score, the sooner a token is dropped."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .relation import token_relation


def mean_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine similarity of each token to the image's other tokens: (B, K, C) -> (B, K) [choice].

    Costs O(K C): the sum over the others is one product with the sum of all unit vectors.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    others = (unit * unit.sum(dim=1, keepdim=True)).sum(dim=-1) - 1
    return others / max(tokens.shape[1] - 1, 1)


def negative_cls_attention(q: Tensor, k: Tensor, heads: int, num_extra_tokens: int = 1) -> Tensor:
    """Minus the attention that the first (class) token pays to each patch, averaged over heads (EViT, MaskAlign).

    Args:
        q, k: a layer's queries and keys, (B, E + K, C), extra tokens first.

    Returns:
        (B, K)
    """
    # Autocast would form the scores in half precision again, and make ties of them.
    with torch.autocast(q.device.type, enabled=False):
        scores = token_relation(q[:, :1].float(), k.float(), heads)
        return -torch.softmax(scores, dim=-1).mean(dim=1)[:, 0, num_extra_tokens:]
