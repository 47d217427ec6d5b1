from .auto_amp import auto_amp_optim_wrapper
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor', 'auto_amp_optim_wrapper']
