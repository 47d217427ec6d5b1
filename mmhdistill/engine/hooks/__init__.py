from .data_check import DataCheck
from .data_report import DataReport
from .diversity_report import DiversityReportHook
from .knn_evaluation import KNNEvaluationHook
from .redundant_token_masker import RedundantTokenMasker
from .teacher_manifest import TeacherManifest

__all__ = [
    'DataCheck', 'DataReport', 'DiversityReportHook', 'KNNEvaluationHook', 'RedundantTokenMasker', 'TeacherManifest'
]
