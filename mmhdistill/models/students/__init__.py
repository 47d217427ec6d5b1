from .maskable_vision_transformer import MaskableVisionTransformer

__all__ = ['MaskableVisionTransformer']
