"""Hybrid distillation of Vision Transformers for OpenMMLab.

``custom_imports = dict(imports=['mmhdistill'])`` in a config is all that an OpenMMLab project needs. Without mmengine
only :mod:`mmhdistill.functional` (pure torch) is available.
"""
import importlib.util

from .version import __version__

if importlib.util.find_spec('mmengine') is not None:
    from . import compat

    compat.apply()  # before mmengine's Runner is imported, which looks for torchvision
    from . import registry

__all__ = ['__version__', 'compat', 'registry']
