from ..compat import require_openmmlab

require_openmmlab()

from .backbones import ViTDet  # noqa: E402
from .distillers import HybridDistiller  # noqa: E402
from .heads import FeatureHead, LinearProjector, MaskDecoder, MLPProjector  # noqa: E402
from .losses import FeatureLoss, MaskedFeatureLoss, TokenRelationLoss  # noqa: E402
from .maskers import CLSAttentionScorer, ProgressiveTokenMasker, RandomScorer, SimilarityScorer  # noqa: E402
from .necks import DeconvPyramid, SimpleFPN  # noqa: E402
from .students import MaskableVisionTransformer  # noqa: E402
from .teachers import CARDS, HuggingFaceTeacher, TeacherCard, TimmTeacher, ViTTeacher, find_card  # noqa: E402

__all__ = [
    'CARDS', 'CLSAttentionScorer', 'DeconvPyramid', 'FeatureHead', 'FeatureLoss', 'HuggingFaceTeacher',
    'HybridDistiller', 'LinearProjector', 'MLPProjector', 'MaskDecoder', 'MaskableVisionTransformer',
    'MaskedFeatureLoss', 'ProgressiveTokenMasker', 'RandomScorer', 'SimilarityScorer', 'SimpleFPN', 'TeacherCard',
    'TimmTeacher', 'TokenRelationLoss', 'ViTDet', 'ViTTeacher', 'find_card'
]
