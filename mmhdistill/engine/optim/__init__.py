from .auto_amp import auto_amp_optim_wrapper
from .bfloat16 import BFloat16OptimWrapper
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['BFloat16OptimWrapper', 'LayerDecayOptimWrapperConstructor', 'auto_amp_optim_wrapper']
