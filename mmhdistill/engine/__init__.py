from .hooks import DataCheck, DataReport, DiversityReportHook, KNNEvaluationHook, RedundantTokenMasker, TeacherManifest
from .optim import LayerDecayOptimWrapperConstructor, auto_amp_optim_wrapper

__all__ = [
    'DataCheck', 'DataReport', 'DiversityReportHook', 'KNNEvaluationHook', 'LayerDecayOptimWrapperConstructor',
    'RedundantTokenMasker', 'TeacherManifest', 'auto_amp_optim_wrapper'
]
