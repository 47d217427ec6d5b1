from .hooks import RedundantTokenMasker
from .optim import auto_amp_optim_wrapper

__all__ = ['RedundantTokenMasker', 'auto_amp_optim_wrapper']
