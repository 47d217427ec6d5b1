"""What would keep a run from working on this machine, and the cure.

Imports none of the packages that it looks at: each is tried in a process of its own, which a broken one may kill.
"""
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from shutil import disk_usage

from .conflicts import FORKS, Environment, find_conflicts

_ROOT = Path(__file__).parents[2]
_PACKAGES = ('torch', 'torchvision', 'triton', 'numpy', 'setuptools', *FORKS, *dict.fromkeys(FORKS.values()), 'timm',
             'transformers', 'safetensors')
# Module -> what is run to try it: the cures of ``import mmhdistill`` come first, as in a run.
_TRIALS = {
    'torch': 'import torch', 'torchvision': 'import torchvision',
    'mmhdistill': 'import mmhdistill.models, mmhdistill.engine',
    'mmcv.ops': 'import mmhdistill, mmcv.ops', 'mmdet': 'import mmhdistill, mmdet.models',
    'mmseg': 'import mmhdistill, mmseg.models', 'timm': 'import mmhdistill, timm',
    'transformers': 'import mmhdistill, transformers',
}
# Where mmhdistill cannot be imported: which of what it needs cannot.
_NEEDED = {'mmengine': 'import mmengine.runner', 'mmcv': 'import mmcv', 'mmpretrain': 'import mmpretrain.models'}
# Data sets of mmpretrain that are downloaded where they are missing.
_DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
_TIMEOUT = 300  # seconds [choice]; a cold file system takes a minute
_GPUS = '''
import json, torch
from torch import cuda, distributed
devices = [dict(error=None) for _ in range(cuda.device_count())]
for i, device in enumerate(devices):
    try:
        d = cuda.get_device_properties(i)
        device.update(name=d.name, capability=[d.major, d.minor], memory=d.total_memory)
        (torch.ones(2, device=i) * 2).sum().item()
    except Exception as error:
        device["error"] = (str(error) or type(error).__name__).splitlines()[0]  # advice follows
nccl = distributed.is_available() and distributed.is_nccl_available()
print(json.dumps(dict(
    built=torch.version.cuda or torch.version.hip, architectures=cuda.get_arch_list(), devices=devices,
    nccl=".".join(map(str, cuda.nccl.version())) if nccl and devices else "built in" if nccl else None)))
'''
_RUN = '''
import json, sys
from mmhdistill.analysis.doctor import describe_run
print(json.dumps(describe_run(*json.loads(sys.argv[1]))))
'''


@dataclass(frozen=True)
class Finding:
    """What is wrong with ``name``, and its cure. A note needs no cure."""

    name: str
    what: str
    cure: str
    note: bool = False


@dataclass
class Report:
    """Sections of facts, name -> rows of (name, text), and the findings."""

    facts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.note]


def examine(config: str | None = None, options: list[str] | None = None, work_dir: str | None = None,
            gpus: int | None = None) -> Report:
    """Look at packages, GPUs, the folders that a run writes to and, with a ``config``, at its settings, the files that
    it reads and its disk.

    Args:
        config: path of a config, or ``mmhdistill::ROOM/NAME.py``.
        options: words of ``--cfg-options``, KEY=VALUE.
        work_dir: by default that of the config, or ``work_dirs``.
        gpus: of the run; by default as :func:`mmhdistill.analysis.plan.plan` has it.
    """
    report = Report()
    report.facts['Versions'] = _versions()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        run = pool.submit(_try, _RUN, json.dumps([config, options, gpus])) if config else None
        cards = pool.submit(_try, _GPUS)
        trials = _try_all(pool, _TRIALS)
        if trials['mmhdistill'].error is not None:
            trials = {**_try_all(pool, _NEEDED), **trials}
        cards, run = cards.result(), run and run.result()
    report.facts['Imports, each in a process of its own'] = [
        (module, f'fine, {trial.seconds:.1f} s' if trial.error is None else trial.error)
        for module, trial in trials.items()]
    errors = {module: trial.error for module, trial in trials.items() if trial.error is not None}
    report.findings += package_findings(Environment(errors))
    report.facts['GPUs'], findings = gpu_findings(cards.output, cards.error, _listed_gpus())
    report.findings += [] if 'torch' in errors else findings
    folders = {'work dir': (Path(work_dir or 'work_dirs'), 0)}
    if run:
        facts, needs, findings = run_findings(config, run, work_dir)
        report.facts[f'Run of {config}'] = facts
        report.findings += findings
        folders = needs
    report.facts['Folders'], findings = folder_findings(folders)
    report.findings += findings
    return report


@dataclass(frozen=True)
class Trial:
    """How a piece of code ran: ``output``, the last object of JSON that it printed, or ``error``, one line."""

    seconds: float
    output: dict | None = None
    error: str | None = None


def _try(code: str, *args: str) -> Trial:
    """Run ``code`` in a process of its own."""
    path = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), str(_ROOT)]))
    begin = time.monotonic()
    try:
        done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, timeout=_TIMEOUT,
                              errors='replace', env={**os.environ, 'PYTHONPATH': path}, check=False)
    except subprocess.TimeoutExpired:
        return Trial(_TIMEOUT, error=f'took more than {_TIMEOUT} s')
    seconds = time.monotonic() - begin
    if done.returncode < 0:
        return Trial(seconds, error=f'the process was killed by {signal.Signals(-done.returncode).name}')
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'exit code {done.returncode}']
        return Trial(seconds, error=lines[-1])
    lines = [line for line in done.stdout.splitlines() if line.startswith('{')]
    return Trial(seconds, output=json.loads(lines[-1]) if lines else None)


def _try_all(pool: ThreadPoolExecutor, codes: dict[str, str]) -> dict[str, Trial]:
    trials = {module: pool.submit(_try, code) for module, code in codes.items() if _is_there(module)}
    return {module: trial.result() for module, trial in trials.items()}


def _is_there(module: str) -> bool:
    """Whether ``module`` should be importable. mmcv-lite has no operators and needs none."""
    if module == 'mmcv.ops':
        return Environment().any_of('mmcv', 'onedl-mmcv') != []
    return module in ('torch', 'mmhdistill') or Environment().has(module)


def _versions() -> list[tuple[str, str]]:
    rows = [('Python', f'{platform.python_version()}, {sys.executable}'), ('system', platform.platform()),
            ('mmhdistill', (_ROOT / 'mmhdistill/version.py').read_text().split("'")[1] + f', {_ROOT}')]
    for package in _PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return rows


def package_findings(environment: Environment) -> list[Finding]:
    """Known conflicts; where there is none that is not cured, also what cannot be imported."""
    found = [Finding(conflict.name, seen, conflict.cure, note=conflict.cured)
             for conflict, seen in find_conflicts(environment)]
    if all(finding.note for finding in found):
        cured = {finding.name for finding in found}
        found += [Finding(module, f'importing {module} fails: {error}.', 'Install it anew: pip install '
                          '--force-reinstall --no-deps and its name under Versions.')
                  for module, error in environment.errors.items() if module not in cured]
    return found


def _listed_gpus() -> list[str]:
    """GPUs that the driver's own tool lists."""
    try:
        done = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.startswith('GPU ')] if done.returncode == 0 else []


def gpu_findings(cards: dict | None, error: str | None,
                 listed: list[str]) -> tuple[list[tuple[str, str]], list[Finding]]:
    """Facts and findings.

    Args:
        cards: what torch says, or None and the ``error``.
        listed: GPUs that the driver lists.
    """
    if cards is None:
        return [('torch', f'cannot be asked: {error}')], [
            Finding('GPU', f'asking torch for GPUs fails: {error}.', 'See what nvidia-smi says: the driver may have to '
                    'be loaded anew. CUDA_VISIBLE_DEVICES= (nothing) trains on the CPU.')]
    devices, built, architectures = cards['devices'], cards['built'], cards['architectures']
    rows, found = [('torch', f'built for CUDA {built}' if built else 'built for the CPU')], []
    for index, device in enumerate(devices):
        name, error, fits = f'GPU {index}', device['error'] or '', True
        if 'capability' in device:
            capability = '.'.join(map(str, device['capability']))
            memory = f'{device["memory"] / 2**30:.1f} GiB'
            rows.append((name, f'{device["name"]}, {memory}, compute capability {capability}'))
            name += f', {device["name"]} of compute capability {capability}'
            fits = _has_kernels(device['capability'], architectures)
        else:
            rows.append((name, error))
        if not fits or 'no kernel image' in error:
            found.append(Finding('GPU', f'torch has no kernels for {name}: it is built for {", ".join(architectures)}.',
                                 'Install a torch that is built for it: https://pytorch.org/get-started/locally'))
        elif error:
            found.append(Finding('GPU', f'torch cannot compute on {name}: {error.rstrip(".")}.', 'nvidia-smi tells '
                                 'what runs on it: wait for that, or choose other GPUs by CUDA_VISIBLE_DEVICES.'))
    rows += [] if devices else [('GPUs', 'none that torch sees')]
    rows.append(('NCCL', cards['nccl'] or 'not built in'))
    if listed and not devices:
        what = f'the driver lists {len(listed)} GPUs, and torch sees none: '
        found.append(
            Finding('GPU', f'{what}it is built for CUDA {built}.', 'Update the driver to one for this CUDA, or install '
                    'torch for an older CUDA; CUDA_VISIBLE_DEVICES has to name GPUs or be unset.') if built else
            Finding('GPU', f'{what}it is built for the CPU.', 'Install torch and torchvision built for CUDA: '
                    'https://pytorch.org/get-started/locally'))
    if len(devices) > 1 and cards['nccl'] is None:
        found.append(Finding('NCCL', f'{len(devices)} GPUs, and torch is built without NCCL, by which they talk.',
                             'Install torch from pip, for Linux: its builds have NCCL.'))
    return rows, found


def _has_kernels(capability: list[int], architectures: list[str]) -> bool:
    """sm_80 runs on 8.0 and later of 8; compute_80 is compiled for anything later when it is needed."""
    own = capability[0] * 10 + capability[1]
    for name in architectures:
        kind, _, number = name.partition('_')
        number = int(''.join(filter(str.isdigit, number)) or 0)
        if number <= own and (kind == 'compute' or number // 10 == capability[0]):
            return True
    return not any(name.startswith(('sm_', 'compute_')) for name in architectures)


def describe_run(config: str, options: list[str] | None, gpus: int | None) -> dict:
    """What a run of ``config`` needs: ``work_dir``, ``wrong`` and ``doubts`` (of its settings), ``missing`` (setting ->
    path that is not there), ``disk`` and ``fetch`` (bytes), ``cache`` or, in their place, ``unknown``: why they are not
    known; ``absent`` where a file that is not there is why. Imports all that a run imports."""
    from argparse import ArgumentParser

    from mmengine.config import Config, DictAction
    from mmengine.logging import MMLogger

    import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)

    from ..compat import config_path
    from ..engine.config_guard import merge_checked
    MMLogger.get_instance('doctor', log_level='ERROR')
    cfg = Config.fromfile(config_path(config))
    work_dir = cfg.get('work_dir') or os.path.join('work_dirs', Path(cfg.filename).stem)
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    try:
        doubts = merge_checked(cfg, parser.parse_args(['--cfg-options', *options]).cfg_options if options else None)
    except ValueError as error:
        return dict(work_dir=work_dir, wrong=str(error), unknown='its settings are wrong')
    from ..models.teachers.fetch import cache_dir
    from .plan import NOT_THERE, plan
    missing = missing_data((cfg.get('train_dataloader') or {}).get('dataset') or {}, 'train_dataloader.dataset')
    try:
        facts = plan(cfg, gpus)
    except FileNotFoundError as error:
        return dict(work_dir=work_dir, doubts=doubts, missing=missing, unknown=str(error),
                    absent=None if missing else str(error))
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError, OSError, ImportError) as error:
        return dict(work_dir=work_dir, doubts=doubts, missing=missing, unknown=str(error))
    sources = {f'model.teachers.{name}': teacher['weights'] for name, teacher in facts['teachers'].items()}
    sources['model.backbone.init_from'] = facts['student']['starts_from']
    missing.update({f'{key}.checkpoint': source.removesuffix(NOT_THERE) for key, source in sources.items()
                    if source.endswith(NOT_THERE)})
    disk = facts['disk']
    # One more than is kept: the next is written before the oldest is removed.
    number = None if disk['checkpoints'] is None else disk['checkpoints'] + 1
    fetch = sum(teacher['bytes'] for teacher in facts['teachers'].values()
                if teacher['weights'].startswith('to be fetched'))
    return dict(work_dir=work_dir, checkpoint=disk['checkpoint'], checkpoints=number, logs=disk['logs'] or 0,
                fetch=fetch, cache=str(cache_dir()), doubts=doubts, missing=missing)


def missing_data(dataset: dict, key: str) -> dict[str, str]:
    """Setting -> path, of the folders and files of a data set, ``key`` in its config, that are not there."""
    inner = {f'{key}.dataset': dataset['dataset']} if 'dataset' in dataset else {
        f'{key}.datasets.{i}': each for i, each in enumerate(dataset.get('datasets') or [])}
    found = {name: path for inner_key, each in inner.items() for name, path in missing_data(each, inner_key).items()}
    kind = dataset.get('type')
    # Another file backend has files of its own.
    if dataset.get('backend_args') or str(getattr(kind, '__name__', kind)).split('.')[-1] in _DOWNLOADED:
        return found
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    parts = {'data_prefix': prefix} if isinstance(prefix, str) else {
        f'data_prefix.{name}': path for name, path in prefix.items()}
    parts['ann_file'] = dataset.get('ann_file')
    paths = {'data_root': root, **{name: os.path.join(root, os.path.expanduser(path)) for name, path in parts.items()
                                   if path and isinstance(path, str)}}
    gone = {name: path for name, path in paths.items() if path and '://' not in path and not os.path.exists(path)}
    if 'data_root' in gone:
        gone = {'data_root': root}
    return {**found, **{f'{key}.{name}': path for name, path in gone.items()}}


def run_findings(config: str, run: Trial, work_dir: str | None) -> tuple[list, dict, list[Finding]]:
    """Facts; folder by name, with the bytes that will be written to it; findings."""
    if run.output is None:
        return [('config', run.error)], {'work dir': (Path(work_dir or 'work_dirs'), 0)}, [
            Finding('config', f'{config} cannot be looked at: {run.error}.', 'Cure what else is found first; then '
                    f'python tools/plan.py {config} says more.')]
    needs = run.output
    folder = Path(work_dir or needs['work_dir'])
    found = [Finding('config', doubt, 'Correct the spelling, if it is wrong: a run goes on with it.', note=True)
             for doubt in needs.get('doubts', [])]
    if 'wrong' in needs:
        found.append(Finding('config', needs['wrong'], 'Correct the spelling.'))
    found += [Finding(key, f"'{path}' is not there.", f'Put it there, or name another: --cfg-options {key}=PATH')
              for key, path in needs.get('missing', {}).items()]
    if needs.get('absent'):
        found.append(Finding('files', needs['absent'], 'Put there what it asks for, or correct the setting.'))
    if 'unknown' in needs:
        return [('disk', f'not known: {needs["unknown"]}')], {'work dir': (folder, 0)}, found
    number, each = needs['checkpoints'], needs['checkpoint']
    rows = [('checkpoints', f'{_gib(each)} each, ' + (
        'all are kept, and how many is not known without the data: at least 2' if number is None else
        f'{number} at a time')), ('logs', _gib(needs['logs'])), ('teachers to fetch', _gib(needs['fetch']))]
    there = sum(path.stat().st_size for path in folder.glob('*.pth'))
    wanted = max((number or 2) * each - there, each) + needs['logs']
    folders = {'work dir': (folder, wanted)}
    if needs['fetch']:
        folders['cache of weights'] = Path(needs['cache']), needs['fetch']
    return rows, folders, found


def folder_findings(folders: dict[str, tuple[Path, int]]) -> tuple[list[tuple[str, str]], list[Finding]]:
    """Facts and findings on folders that will be written to, by name, with the bytes that each will take."""
    rows, found, wanted = [], [], {}
    for name, (folder, need) in folders.items():
        existing = folder.expanduser().absolute()
        while not existing.exists():
            existing = existing.parent
        free = disk_usage(existing).free
        rows.append((name, f'{folder}, {_gib(free)} free' + (f', {_gib(need)} needed' if need else '')))
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b'0')
        except OSError as error:
            found.append(Finding(name, f'{existing} cannot be written to: {error.strerror}.', 'Give another --work-dir.'
                                 if name == 'work dir' else 'Set MMHDISTILL_CACHE to another folder.'))
        # What shares a disk shares its room.
        shared = wanted.setdefault(existing.stat().st_dev, [0, free, []])
        shared[0] += need
        shared[2].append(f'{name} {folder}')
    for need, free, names in wanted.values():
        if need > free:
            found.append(Finding('disk', f'{_gib(need)} will be written to {" and ".join(names)}, and {_gib(free)} are '
                                 'free.', 'Make room, give another --work-dir, or keep fewer checkpoints: '
                                 '--cfg-options default_hooks.checkpoint.max_keep_ckpts=1'))
    return rows, found


def _gib(value: float) -> str:
    return f'{value / 2**30:.2f} GiB'


def as_text(report: Report) -> str:
    lines = []
    for title, rows in report.facts.items():
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f'  {name:<{width}}  {text}' for name, text in rows), '']
    for finding in report.findings:
        for label, text in (('note' if finding.note else 'FOUND', f'{finding.name}: {finding.what}'),
                            ('cure', finding.cure)):
            for line in text.splitlines():
                lines += textwrap.wrap(line, 120, initial_indent=f'{label:<7}', subsequent_indent=' ' * 7,
                                       break_long_words=False, break_on_hyphens=False)
                label = ''
    number = len(report.problems)
    lines.append('Nothing is in the way of a run.' if not number else
                 f'{number} {"thing has" if number == 1 else "things have"} to be cured; run this again then.')
    return '\n'.join(lines)
