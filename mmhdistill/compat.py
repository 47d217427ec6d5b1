"""Known conflicts between the frozen OpenMMLab releases and current packages: cured here, or told in one sentence.

Nothing is changed where nothing is broken.
"""
import contextlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

_TORCHVISION_SCHEMAS = None  # keeps the declared schemas alive


def apply() -> None:
    """Cure what can be cured; called once by ``import mmhdistill``."""
    _name_package_for_configs()
    _declare_torchvision_ops()
    _allow_runner_checkpoints()
    _read_checkpoints_as_data()
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
    from .analysis.conflicts import Environment, find_conflicts
    for conflict, seen in find_conflicts(Environment(), stops_alone=True):
        raise ImportError(f'{seen} {conflict.cure}')


def installed_version(package: str) -> tuple[int, ...] | None:
    """(2, 13, 0) of '2.13.0+cpu'; None where the package is not installed."""
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
    if installed_version('onedl-mmsegmentation') is not None:  # the maintained fork forgot its own name
        MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
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
    raise pickle.UnpicklingError(f'refused getattr({owner!r}, {name!r}) in a checkpoint')


# How the checkpoint calls it. torch >= 2.6 takes the name as an argument; 2.5 reads it off the function.
_history_buffer_getattr.__module__ = 'builtins'
_history_buffer_getattr.__name__ = _history_buffer_getattr.__qualname__ = 'getattr'


def _allow_runner_checkpoints() -> None:
    """torch >= 2.6 loads with ``weights_only=True``; a Runner checkpoint holds HistoryBuffer and numpy scalars.

    Exactly these are allowed, so that resuming works and a checkpoint still cannot run code.
    """
    import numpy as np
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = {type(np.dtype(code)) for code in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', '?')}
    torch.serialization.add_safe_globals([
        HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes,
        _history_buffer_getattr
    ])


def refusal(error: Exception) -> str:
    """Why a weight file was not read, in a few words: torch hides it behind advice, which begins with how to run the
    code."""
    refused = re.search(r'GLOBAL ([\w.]+) (?:was not an allowed global|whose module)', str(error))
    if refused:
        return f'it asks for {refused[1]}'
    detail = re.search(r'WeightsUnpickler error:\s*(.+)', str(error))
    return f'{type(error).__name__}: {detail[1] if detail else error}'.splitlines()[0]


def _read_checkpoints_as_data() -> None:
    """Whatever mmengine loads (``resume``, ``load_from``, ``init_cfg``) is read with ``weights_only=True``.

    torch reads the file of a URL without it, and torch < 2.6 every file. The maintained forks try again without it,
    and allow ``getattr`` of anything the first time.
    """
    import torch
    from mmengine.runner import checkpoint as loading
    load = loading.CheckpointLoader.load_checkpoint
    if load.__module__ == __name__:
        return

    def load_checkpoint(cls, filename, map_location=None, logger='current'):
        with _weights_only():
            try:
                found = load(filename, map_location, logger)
            except pickle.UnpicklingError as error:
                raise ValueError(f'checkpoint {filename} cannot be read: it is damaged, or holds Python objects that '
                                 f'could run code, which are refused ({refusal(error)}). Give another checkpoint, or '
                                 'save its state_dict alone with torch.save.') from error
        meta = found.get('meta') if isinstance(found, dict) else None
        if isinstance(meta, dict):
            # Runner.resume would run this text; checkpoints of mmengine keep theirs as 'cfg', which it leaves alone.
            meta.pop('config', None)
        return found

    loading.CheckpointLoader.load_checkpoint = classmethod(load_checkpoint)
    if hasattr(loading, '_safe_torch_load'):

        def _safe_torch_load(file, map_location=None, weights_only=None):
            return torch.load(file, map_location=map_location, weights_only=True)

        loading._safe_torch_load = _safe_torch_load


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Every ``torch.load`` of the block, whatever its arguments."""
    force, allow = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
    before = {name: os.environ.pop(name, None) for name in (force, allow)}
    os.environ[force] = '1'
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})
