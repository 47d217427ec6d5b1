from .mask_decoder import MaskDecoder
from .projectors import LinearProjector, MLPProjector

__all__ = ['LinearProjector', 'MLPProjector', 'MaskDecoder']
