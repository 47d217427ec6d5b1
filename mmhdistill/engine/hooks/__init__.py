from .data_check import DataCheck
from .diversity_report import DiversityReportHook
from .redundant_token_masker import RedundantTokenMasker
from .teacher_manifest import TeacherManifest

__all__ = ['DataCheck', 'DiversityReportHook', 'RedundantTokenMasker', 'TeacherManifest']
