from .progressive_token_masker import ProgressiveTokenMasker
from .scorers import CLSAttentionScorer, RandomScorer, SimilarityScorer

__all__ = ['CLSAttentionScorer', 'ProgressiveTokenMasker', 'RandomScorer', 'SimilarityScorer']
