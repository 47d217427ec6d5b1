"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; DINO's protocol)."""
import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 2**27  # 512 MiB of float32


def knn_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, k: int = 20,
                temperature: float = 0.07, block: int = 1024) -> Tensor:
    """Class of each query: the k nearest bank features by cosine similarity vote with weight exp(similarity / t).

    Args:
        bank: (M, C) features with ``bank_labels`` (M,).
        queries: (Q, C).
        block: queries compared at a time, to bound the (block, M) similarity matrix; fewer where the bank is large,
            for at most 512 MiB [choice].

    Returns:
        (Q,) predicted classes.

    Raises:
        ValueError: too few bank images, or features that are not finite.
    """
    if not (torch.isfinite(bank).all() and torch.isfinite(queries).all()):
        raise ValueError('k-NN of features that are not finite: the model has diverged. Take an earlier checkpoint.')
    if len(bank) < k:
        raise ValueError(f'k-NN with k={k} needs at least {k} bank images, got {len(bank)}: '
                         'give more images (a data set of stride n takes every n-th) or a smaller k.')
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    predictions = []
    for part in queries.split(min(block, max(1, _SIMILARITIES // len(bank)))):
        with torch.autocast(part.device.type, enabled=False):
            similarity, index = (part @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        # Relative to the nearest: the same vote, and no overflow at low temperatures.
        votes.scatter_add_(1, bank_labels[index], ((similarity - similarity[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, **kwargs) -> float:
    """Top-1 accuracy in percent of :func:`knn_predict`."""
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    predictions = knn_predict(bank, bank_labels, queries, num_classes=num_classes, **kwargs)
    return 100 * (predictions == query_labels).double().mean().item()
