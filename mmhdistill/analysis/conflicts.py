"""Packages that do not work together, as data: how each conflict is seen, and its cure.

Needs none of the packages that it speaks of, which may be broken.
"""
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata

from ..compat import installed_version

# The frozen releases, and the maintained forks of them, which have the same import names.
FORKS = {'mmengine': 'onedl-mmengine', 'mmcv': 'onedl-mmcv', 'mmcv-lite': 'onedl-mmcv', 'mmpretrain':
         'onedl-mmpretrain', 'mmdet': 'onedl-mmdetection', 'mmsegmentation': 'onedl-mmsegmentation'}


@dataclass(frozen=True)
class Environment:
    """What is installed, and what of it can be imported.

    Attributes:
        errors: module -> why it cannot be imported, of those that were tried.
    """

    errors: dict[str, str] = field(default_factory=dict)

    def version(self, package: str) -> tuple[int, ...] | None:
        """Of an installed package, such as (2, 13, 0)."""
        return installed_version(package)

    def has(self, module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    def any_of(self, *packages: str) -> list[str]:
        """Those that are installed."""
        return [package for package in packages if self.version(package) is not None]

    def failed(self, module: str, text: str) -> bool:
        """Whether importing ``module`` failed with ``text`` in its message."""
        return text in self.errors.get(module, '')


@dataclass(frozen=True)
class Conflict:
    """
    Attributes:
        name: of what has to change.
        seen: what is wrong, in a sentence; '' where it is not.
        cure: what to do.
        stops: whether ``mmhdistill.models`` cannot work with it, and says so when it is imported.
        cured: whether ``import mmhdistill`` cures it, or what of it matters here.
    """

    name: str
    seen: Callable[[Environment], str]
    cure: str
    stops: bool = False
    cured: bool = False


def find_conflicts(environment: Environment, stops_alone: bool = False) -> Iterator[tuple[Conflict, str]]:
    """Every conflict of ``environment``, with what is wrong."""
    for conflict in CONFLICTS:
        if (conflict.stops or not stops_alone) and (seen := conflict.seen(environment)):
            yield conflict, seen


def _mixed(env: Environment) -> str:
    originals, forks = env.any_of(*FORKS), env.any_of(*dict.fromkeys(FORKS.values()))
    return originals and forks and (f'{", ".join(originals)} and their maintained forks {", ".join(forks)} are '
                                    'installed together, and overwrite each other.') or ''


def _two_mmcvs(env: Environment) -> str:
    both = len(env.any_of('mmcv', 'mmcv-lite')) == 2
    return 'mmcv and mmcv-lite are both installed and overwrite each other.' if both else ''


def _no_pkg_resources(env: Environment) -> str:
    missing = env.version('mmengine') is not None and not env.has('pkg_resources')
    return 'mmengine needs pkg_resources, which setuptools dropped in version 82.' if missing else ''


def _not_installed(module: str) -> Callable[[Environment], str]:
    return lambda env: '' if env.has(module) else f"mmhdistill's models need {module}, which is not installed."


def _new_transformers(env: Environment) -> str:
    version = env.version('transformers')
    if version is None or version <= (4, 48, 3) or env.version('mmpretrain') is None:
        return ''
    return (f'transformers {_text(version)} is installed, and mmpretrain cannot be imported beside transformers > '
            '4.48.3.')


def _old_torch(env: Environment) -> str:
    version = env.version('torch')
    return '' if version is None or version >= (2, 5) else f'torch {_text(version)} is older than 2.5.'


def _another_torchvision(env: Environment) -> str:
    """A release of torchvision is made for one release of torch, which it names."""
    torch = env.version('torch')
    if torch is None or env.version('torchvision') is None:
        return ''
    named = re.search(r'(?m)^torch *\(?==([\d.]+)', '\n'.join(metadata.requires('torchvision') or []))
    if not named or named[1] == _text(torch):
        return ''
    return f'torchvision {_text(env.version("torchvision"))} is made for torch {named[1]}, and {_text(torch)} is there.'


def _torchvision_build(env: Environment) -> str:
    broken = env.failed('torchvision', 'operator torchvision::')
    return 'torchvision is of another build (CUDA or CPU) than torch.' if broken else ''


def _new_mmcv(env: Environment) -> str:
    version, users = env.version('mmcv') or env.version('mmcv-lite'), env.any_of('mmdet', 'mmsegmentation')
    if version is None or version < (2, 2) or not users:
        return ''
    return f'mmcv {_text(version)} is installed, and {" and ".join(users)} refuse mmcv >= 2.2.0.'


_OPS_USERS = ('mmdet', 'mmsegmentation', 'onedl-mmdetection', 'onedl-mmsegmentation')


def _no_ops(env: Environment) -> str:
    users = env.any_of(*_OPS_USERS)
    without = env.any_of('mmcv-lite') or env.failed('mmcv.ops', "No module named 'mmcv._ext'")
    return f'{" and ".join(users)} need the compiled operators of mmcv, which has none here.' if users and without \
        else ''


def _old_ops(env: Environment) -> str:
    broken = env.failed('mmcv.ops', 'undefined symbol') or env.failed('mmcv.ops', 'cannot open shared object file')
    return "mmcv's operators were compiled for another torch than the one that is installed." if broken else ''


def _undeclared(env: Environment) -> str:
    users = env.any_of('mmsegmentation', 'onedl-mmsegmentation')
    missing = [module for module in ('ftfy', 'regex') if not env.has(module)]
    return f'{users[0]} needs {" and ".join(missing)} without saying so.' if users and missing else ''


def _openmim(env: Environment) -> str:
    return 'openmim is installed, and replaces setuptools and others by old ones.' if env.any_of('openmim') else ''


def _text(version: tuple[int, ...]) -> str:
    return '.'.join(map(str, version))


CONFLICTS = (
    Conflict('maintained forks', _mixed, 'Make a new virtual environment with one kind of them: what is overwritten '
             'cannot be repaired in place.', stops=True),
    Conflict('setuptools', _no_pkg_resources, "Run: pip install 'setuptools<82'", stops=True),
    Conflict('mmcv', _not_installed('mmcv'), 'Run: pip install --no-build-isolation mmcv-lite==2.1.0', stops=True),
    Conflict('mmpretrain', _not_installed('mmpretrain'), 'Run: pip install --no-build-isolation mmpretrain==1.2.0',
             stops=True),
    Conflict('transformers', _new_transformers, "Run: pip install 'transformers<=4.48.3'", stops=True),
    Conflict('mmcv', _two_mmcvs, 'Run: pip uninstall -y mmcv mmcv-lite, then install one of them (mmcv for detection '
             'and segmentation, else mmcv-lite).', stops=True),
    Conflict('torch', _old_torch, "Run: pip install 'torch>=2.5' and the torchvision of the same release: an older one "
             'cannot be told what a checkpoint may hold.'),
    Conflict('torchvision', _another_torchvision, 'Run: pip install torch torchvision, both in one command.'),
    Conflict('torchvision', _torchvision_build, 'import mmhdistill declares the operators that are missing, so that '
             'transforms work. Where the kernels of torchvision.ops are needed, install torch and torchvision by the '
             'command that pytorch.org/get-started/locally has for this machine', cured=True),
    Conflict('mmcv', _new_mmcv, 'Run: pip install --no-build-isolation mmcv==2.1.0'),
    Conflict('mmcv', _no_ops, "Run: pip uninstall -y mmcv mmcv-lite onedl-mmcv, pip install 'setuptools<82' ninja, and "
             'pip install --no-build-isolation --no-cache-dir mmcv==2.1.0 (onedl-mmcv==2.3.6 with the maintained '
             'forks): without --no-build-isolation the operators are left out.'),
    Conflict('mmcv', _old_ops, "Run: pip cache remove '*mmcv*', then pip install --no-build-isolation "
             '--force-reinstall --no-deps mmcv==2.1.0 (onedl-mmcv==2.3.6 with the maintained forks): pip keeps the '
             'wheel of the torch before.'),
    Conflict('ftfy and regex', _undeclared, 'Run: pip install ftfy regex'),
    Conflict('openmim', _openmim, "Run: pip uninstall -y openmim, then pip install 'setuptools<82': pip alone installs "
             'all that is needed.'),
)
