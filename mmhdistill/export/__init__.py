from .student import Features, load_student
from .write import TARGETS, export

__all__ = ['TARGETS', 'Features', 'export', 'load_student']
