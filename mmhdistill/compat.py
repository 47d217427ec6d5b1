"""Known conflicts between the frozen OpenMMLab releases and current packages: cured here, or told in one sentence.

Nothing is changed where nothing is broken.
"""
import importlib.util
import sys
import warnings
from importlib import metadata
from pathlib import Path

_TORCHVISION_SCHEMAS = None  # keeps the declared schemas alive


def apply() -> None:
    """Cure what can be cured; called once by ``import mmhdistill``."""
    _name_package_for_configs()
    _declare_torchvision_ops()
    _allow_runner_checkpoints()
    # mmcv-lite has all that is needed here, and asks for mmcv, which must not lie beside it.
    warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')


def config_path(name: str) -> str:
    """Path of ``mmhdistill::ROOM/NAME.py``, a config of this package; any other name is a path already."""
    package, _, inner = name.partition('::')
    if package != 'mmhdistill' or not inner:
        return name
    configs = Path(__file__).parent / '.mim/configs'
    if not (configs / inner).is_file():
        there = sorted(str(path.relative_to(configs)) for path in configs.rglob('*.py') if '_base_' not in path.parts)
        raise FileNotFoundError(f"config '{name}' is not in mmhdistill, which has {there}.")
    return str(configs / inner)


def require_openmmlab() -> None:
    """Raise ImportError with the cure when the packages that pre-training needs cannot work together."""
    if _version('mmengine') is not None and importlib.util.find_spec('pkg_resources') is None:
        raise ImportError('mmengine needs pkg_resources, which setuptools dropped in version 82. '
                          "Run: pip install 'setuptools<82'")
    for module, package in (('mmcv', 'mmcv-lite==2.1.0'), ('mmpretrain', 'mmpretrain==1.2.0')):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"mmhdistill's models need {module}, which is not installed. Run: "
                              f'pip install --no-build-isolation {package}')
    transformers = _version('transformers')
    if transformers is not None and transformers > (4, 48, 3) and _version('mmpretrain') is not None:
        raise ImportError(f'transformers {".".join(map(str, transformers))} is installed, and mmpretrain cannot be '
                          "imported beside transformers > 4.48.3. Run: pip install 'transformers<=4.48.3'")
    if _version('mmcv') is not None and _version('mmcv-lite') is not None:
        raise ImportError('mmcv and mmcv-lite are both installed and overwrite each other. Run: pip uninstall -y mmcv '
                          'mmcv-lite, then install one of them (mmcv for detection and segmentation, else mmcv-lite).')


def _version(package: str) -> tuple[int, ...] | None:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split('+')[0].split('.')[:3] if part.isdigit())


def _name_package_for_configs() -> None:
    """Let ``_base_ = 'mmhdistill::...'`` resolve to the configs of the imported package.

    mmengine knows a fixed table of package names, looks for an editable install in site-packages, where only a link
    lies, and would set our scope on what is mmpretrain's.
    """
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE
    MODULE2PACKAGE.setdefault('mmhdistill', 'mmhdistill')
    resolve = Config._get_cfg_path
    if resolve.__module__ == __name__:
        return

    def _get_cfg_path(cfg_path: str, filename: str):
        return (config_path(cfg_path), None) if cfg_path.startswith('mmhdistill::') else resolve(cfg_path, filename)

    Config._get_cfg_path = staticmethod(_get_cfg_path)


def _declare_torchvision_ops() -> None:
    """A torchvision built for CUDA beside a CPU torch dies on import for want of two operator schemas.

    Declaring the schemas makes transforms work; the kernels of ``torchvision.ops`` stay absent, and say so when called.
    """
    import torch
    try:
        import torchvision  # noqa: F401
        return
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if 'operator torchvision::' not in str(error):
            raise
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        del sys.modules[name]
    global _TORCHVISION_SCHEMAS
    _TORCHVISION_SCHEMAS = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        _TORCHVISION_SCHEMAS.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    import torchvision  # noqa: F401


def _history_buffer_getattr(owner, name):
    """The one ``getattr`` that a Runner checkpoint needs: the statistics methods of HistoryBuffer."""
    from mmengine.logging.history_buffer import HistoryBuffer
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise RuntimeError(f'refused getattr({owner!r}, {name!r}) in a checkpoint')


def _allow_runner_checkpoints() -> None:
    """torch >= 2.6 loads with ``weights_only=True``; a Runner checkpoint holds HistoryBuffer and numpy scalars.

    Exactly these are allowed, so that resuming works and a checkpoint still cannot run code.
    """
    import numpy as np
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = {type(np.dtype(code)) for code in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', '?')}
    torch.serialization.add_safe_globals([
        HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes,
        (_history_buffer_getattr, 'builtins.getattr')
    ])
