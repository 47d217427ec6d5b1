from .data_check import DataCheck
from .redundant_token_masker import RedundantTokenMasker
from .teacher_manifest import TeacherManifest

__all__ = ['DataCheck', 'RedundantTokenMasker', 'TeacherManifest']
