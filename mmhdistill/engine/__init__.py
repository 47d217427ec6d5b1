from .hooks import DataCheck, DiversityReportHook, RedundantTokenMasker, TeacherManifest
from .optim import LayerDecayOptimWrapperConstructor, auto_amp_optim_wrapper

__all__ = [
    'DataCheck', 'DiversityReportHook', 'LayerDecayOptimWrapperConstructor', 'RedundantTokenMasker',
    'TeacherManifest', 'auto_amp_optim_wrapper'
]
