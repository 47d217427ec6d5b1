"""What a run is made of, written down, and what differs between two of them."""
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

# What a resumed run may not change in silence.
GUARDED = ('student', 'teachers', 'losses')
_PACKAGES = ('torch', 'torchvision', 'numpy', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmcv-lite', 'onedl-mmcv',
             'mmpretrain', 'onedl-mmpretrain', 'mmdet', 'mmsegmentation', 'timm', 'transformers')
# Of a model: where weights came from at the start, and files that may have moved. Not what is trained.
_STARTS = {'init_cfg', 'init_from', 'checkpoint', 'pretrained'}
# Of a model: how it is computed, not what.
_MEANS = {'with_cp', 'compile'}
# Where a run happens and what it prints.
_PLACES = {'work_dir', 'resume', 'load_from', 'launcher', 'log_level', 'vis_backends', 'visualizer', 'experiment_name',
           'model_wrapper_cfg', 'env_cfg', 'custom_imports', 'default_scope', 'log_processor', 'runner_type'}
_IDENTITY = ('model', 'sha256', 'dtype', 'mean', 'std')
_SAMPLES = 1000


def teacher_receipts(runner: Runner) -> dict[str, dict]:
    """Of a distiller's teachers; of a model that goes on with a student, of those that it had."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if hasattr(model, 'manifest'):
        return model.manifest
    return {name: receipt for module in model.modules()
            for name, receipt in getattr(module, 'started_from', {}).get('teachers', {}).items()}


def describe_run(runner: Runner) -> dict:
    """The manifest of a run, JSON types only.

    Returns:
        ``config``; ``versions`` of packages; ``git``, commit and whether files differ from it, None outside of a
        repository; ``teachers``, their receipts; ``data``, :func:`fingerprint` of the training data; ``seeds``, with
        the number of processes; ``command``.
    """
    randomness = runner._randomness_cfg
    return dict(
        config=_plain(runner.cfg.to_dict()),
        versions=_versions(),
        git=git_state(Path(__file__).parents[2]),
        teachers=teacher_receipts(runner),
        data=fingerprint(runner.train_dataloader.dataset),
        seeds=dict(seed=runner.seed - (runner.rank if randomness.get('diff_rank_seed') else 0),
                   diff_rank_seed=bool(randomness.get('diff_rank_seed')), processes=runner.world_size),
        command=list(sys.argv))


def _versions() -> dict[str, str]:
    from .. import __version__
    versions = dict(mmhdistill=__version__, python=platform.python_version())
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict | None:
    """``commit`` of the repository whose root ``folder`` is, and whether tracked files are ``changed`` since."""
    if not (folder / '.git').exists():
        return None
    try:
        commit, status = (subprocess.run(['git', '-C', str(folder), *command], capture_output=True, text=True,
                                         timeout=10, check=True).stdout.strip()
                          for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no']))
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(commit=commit, changed=bool(status))


def fingerprint(dataset) -> dict:
    """``type``, ``count`` and, where samples are files, sha256 of their ``names``: folder and file.

    Of at most 1,000 samples, evenly spread [choice]: a fraction of a second at ImageNet's size. Contents are not read.
    """
    found = dict(type=type(dataset).__name__, count=len(dataset), names=None)
    if hasattr(dataset, 'get_data_info') and len(dataset):
        number = min(len(dataset), _SAMPLES)
        infos = [dataset.get_data_info(i * len(dataset) // number) for i in range(number)]
        if all(isinstance(info, dict) and 'img_path' in info for info in infos):
            names = ('/'.join(Path(str(info['img_path'])).parts[-2:]) for info in infos)
            found['names'] = hashlib.sha256('\n'.join(names).encode()).hexdigest()
    return found


def _plain(value):
    """Of a config: what JSON can hold; of anything else the name of its type."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    kind = value if isinstance(value, type) or callable(value) and hasattr(value, '__qualname__') else type(value)
    return f'{kind.__module__}.{kind.__qualname__}'


def differences(before: dict, now: dict) -> dict[str, list[str]]:
    """Between two manifests, a line each: of the student, the teachers, the losses, and of the ``rest``."""
    old, new = _facts(before), _facts(now)
    found: dict[str, list[str]] = {name: [] for name in (*GUARDED, 'rest')}
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, 'absent') != new.get(key, 'absent'):
            found[_part(key)].append(f'{key}: {_short(old.get(key, "absent"))} -> {_short(new.get(key, "absent"))}')
    return found


def _facts(manifest: dict) -> dict:
    facts = {}
    for key, value in _flat(manifest['config']):
        parts = key.split('.')
        start = parts[0] == 'model' and _STARTS & set(parts)
        if parts[0] not in _PLACES and parts[:2] != ['default_hooks', 'manifest'] and not start:
            facts[key] = value
    for name, receipt in manifest['teachers'].items():
        if receipt['role'] == 'teacher':
            facts.update({f'teacher {name}.{key}': receipt[key] for key in _IDENTITY})
    for kind in ('versions', 'git', 'data', 'seeds'):
        facts.update({f'{kind} {key}': value for key, value in (manifest[kind] or {}).items()})
    return facts


def _flat(value, prefix: str = '') -> Iterator[tuple[str, object]]:
    """Names with dots, and values; a list is one value unless it holds dicts."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f'{prefix}{key}.')
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for i, part in enumerate(value):
            yield from _flat(part, f'{prefix}{i}.')
    else:
        yield prefix.removesuffix('.'), value


def _part(key: str) -> str:
    if key.startswith('model.test_cfg') or key.startswith('model.') and key.rpartition('.')[2] in _MEANS:
        return 'rest'
    if key.startswith(('teacher ', 'model.teachers.')):
        return 'teachers'
    if key.startswith('model.losses.'):
        return 'losses'
    if key.startswith('model.masker') or not key.startswith(('model.', 'data_preprocessor')):
        return 'rest'
    return 'student'


def _short(value) -> str:
    text = value if value == 'absent' else repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
