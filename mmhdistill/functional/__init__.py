"""The mathematics, as pure functions of tensors. Needs torch alone."""
from .attention import attention_distance, attention_from_qk, attention_nmi, attention_statistics
from .features import feature_distance, whiten
from .knn import knn_accuracy, knn_predict
from .position import POSITION_RULES, resample_positions, sincos_positions
from .redundancy import mean_similarity, negative_cls_attention
from .relation import relation_kl, relation_smooth_l1, split_heads, token_relation
from .representation import effective_rank, fourier_log_amplitude, linear_cka, linear_cka_matrix
from .schedule import ramp
from .tokens import (
    check_keep_rate,
    dropped_ids,
    gather_patches,
    gather_tokens,
    kept_counts,
    least_redundant,
    scatter_tokens,
)
from .windows import from_windows, relative_attention, relative_embeddings, resample_table, to_windows

__all__ = [
    'POSITION_RULES', 'attention_distance', 'attention_from_qk', 'attention_nmi', 'attention_statistics',
    'check_keep_rate', 'dropped_ids', 'effective_rank', 'feature_distance', 'fourier_log_amplitude', 'from_windows',
    'gather_patches', 'gather_tokens', 'kept_counts', 'knn_accuracy', 'knn_predict', 'least_redundant',
    'linear_cka', 'linear_cka_matrix', 'mean_similarity', 'negative_cls_attention', 'ramp', 'relation_kl',
    'relation_smooth_l1', 'relative_attention', 'relative_embeddings', 'resample_positions', 'resample_table',
    'scatter_tokens', 'sincos_positions', 'split_heads', 'to_windows', 'token_relation', 'whiten'
]
