"""Redundancy scorers of the token masker.

A scorer names the tap kinds it reads (``kinds``), checks the model they come from, and scores the patches still kept:
the higher, the sooner dropped. A new one is a class of a few lines.
"""
import torch
from torch import Tensor

from ...functional import mean_similarity, negative_cls_attention
from ...registry import MODELS
from ..taps import ViTSpec


@MODELS.register_module()
class SimilarityScorer:
    """Mean cosine similarity of a token's hidden state to the image's other kept tokens [choice]."""

    kinds = frozenset({'hidden'})

    def check(self, spec: ViTSpec) -> None:
        """Any model will do."""

    def __call__(self, tokens: dict[str, Tensor], keep_ids: Tensor, spec: ViTSpec) -> Tensor:
        """
        Args:
            tokens: kind -> (B, E + K, C) of the K patches still kept, the extra tokens first.
            keep_ids: (B, K) their indices in the full image.

        Returns:
            (B, K)
        """
        return mean_similarity(tokens['hidden'][:, spec.num_extra_tokens:])


@MODELS.register_module()
class CLSAttentionScorer:
    """Minus the attention that the class token pays to a patch, averaged over heads (EViT, MaskAlign)."""

    kinds = frozenset({'q', 'k'})

    def check(self, spec: ViTSpec) -> None:
        if not spec.has_class_token:
            raise ValueError('CLSAttentionScorer needs a model with a class token, but the scoring model has none: '
                             'score with another model or use SimilarityScorer.')

    def __call__(self, tokens: dict[str, Tensor], keep_ids: Tensor, spec: ViTSpec) -> Tensor:
        """Arguments and result as :meth:`SimilarityScorer.__call__`."""
        return negative_cls_attention(tokens['q'], tokens['k'], spec.num_heads, spec.num_extra_tokens)


@MODELS.register_module()
class RandomScorer:
    """Uniformly random scores from the process's torch generator: the baseline, and MAE-like masking."""

    kinds = frozenset()

    def check(self, spec: ViTSpec) -> None:
        """Any model will do."""

    def __call__(self, tokens: dict[str, Tensor], keep_ids: Tensor, spec: ViTSpec) -> Tensor:
        """Arguments and result as :meth:`SimilarityScorer.__call__`."""
        return torch.rand(keep_ids.shape, device=keep_ids.device)
