from .hooks import RedundantTokenMasker, TeacherManifest
from .optim import auto_amp_optim_wrapper

__all__ = ['RedundantTokenMasker', 'TeacherManifest', 'auto_amp_optim_wrapper']
