"""Comparing final features: target normalisation and distances (Feature Distillation, arXiv 2205.14141)."""
import torch.nn.functional as F
from torch import Tensor


def whiten(features: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without affine over the channels of each token, in fp32 or wider: (B, N, C) -> (B, N, C)."""
    features = features.float() if features.dtype.itemsize < 4 else features
    return F.layer_norm(features, features.shape[-1:], eps=eps)


def feature_distance(prediction: Tensor, target: Tensor, distance: str, smooth_l1_beta: float = 2.0) -> Tensor:
    """Mean distance of two (B, N, C) tensors: ``smooth_l1`` or ``mse`` of elements, ``cosine`` 1 - cos of tokens."""
    prediction = prediction.to(target.dtype)
    if distance == 'smooth_l1':
        return F.smooth_l1_loss(prediction, target, beta=smooth_l1_beta)
    if distance == 'mse':
        return F.mse_loss(prediction, target)
    if distance == 'cosine':
        return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()
    raise ValueError(f"unknown feature distance '{distance}': choose smooth_l1, cosine or mse.")
