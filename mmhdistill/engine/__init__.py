from .hooks import RedundantTokenMasker, TeacherManifest
from .optim import LayerDecayOptimWrapperConstructor, auto_amp_optim_wrapper

__all__ = ['LayerDecayOptimWrapperConstructor', 'RedundantTokenMasker', 'TeacherManifest', 'auto_amp_optim_wrapper']
