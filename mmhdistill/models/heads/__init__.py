from .feature_head import FeatureHead
from .mask_decoder import MaskDecoder
from .projectors import LinearProjector, MLPProjector

__all__ = ['FeatureHead', 'LinearProjector', 'MLPProjector', 'MaskDecoder']
