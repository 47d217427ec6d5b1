from .hooks import DataCheck, DiversityReportHook, KNNEvaluationHook, RedundantTokenMasker, TeacherManifest
from .optim import LayerDecayOptimWrapperConstructor, auto_amp_optim_wrapper

__all__ = [
    'DataCheck', 'DiversityReportHook', 'KNNEvaluationHook', 'LayerDecayOptimWrapperConstructor',
    'RedundantTokenMasker', 'TeacherManifest', 'auto_amp_optim_wrapper'
]
