from .hooks import DataCheck, RedundantTokenMasker, TeacherManifest
from .optim import LayerDecayOptimWrapperConstructor, auto_amp_optim_wrapper

__all__ = [
    'DataCheck', 'LayerDecayOptimWrapperConstructor', 'RedundantTokenMasker', 'TeacherManifest',
    'auto_amp_optim_wrapper'
]
