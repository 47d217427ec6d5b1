from .auto_amp import auto_amp_optim_wrapper
from .cpu_amp import CPUAmpOptimWrapper
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['CPUAmpOptimWrapper', 'LayerDecayOptimWrapperConstructor', 'auto_amp_optim_wrapper']
