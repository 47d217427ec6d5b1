"""A grid of training runs that differ in a word: run, resumed, compared."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from mmengine.config import Config

from ..compat import config_path
from ..engine.config_guard import READ, merge_checked

TOOLS = Path(__file__).parents[1] / '.mim/tools'


class Run(NamedTuple):
    cell: str
    seed: int
    folder: Path
    recipe: str


def run_grid(grid: str | Path, out: Path, gpus: int = 0, jobs: int = 1) -> list[dict]:
    """Train and test every cell of ``grid`` with every seed in ``out``; finished ones are left.

    Args:
        grid: a config with ``config`` (the recipe that all cells share), ``seeds`` and ``cells``, name -> what differs.
        gpus: processes of each run; 0 trains in one without a launcher.
        jobs: runs at a time. Each has GPUs and a port of its own, or its share of the cores.

    Returns:
        One row per run: ``cell``, ``seed``, the numbers among the metrics of the recipe's ``test_evaluator``, and
        ``minutes`` over all attempts, absent when one was killed before it could note its time. A run that failed has
        ``failed``, the reason, instead.

    Raises:
        ValueError: before any run, for a grid that cannot give a right table, a folder of ``out`` with a run of another
            config, and an ``out`` in use.
    """
    return run_all(plan(grid, out), out, gpus, jobs)


def heed_signals() -> None:
    """A plain kill ends the runs in progress too, and so does an interrupt, which a shell has its background jobs
    ignore: both raise KeyboardInterrupt."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def run_all(runs: list[Run], out: Path, gpus: int = 0, jobs: int = 1) -> list[dict]:
    """What :func:`run_grid` does and returns, for runs that are planned, in folders of ``out``."""
    for run in runs:
        _check_folder(run)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / '.lock', timeout=0):
            return _run_all(runs, gpus, jobs)
    except Timeout:
        raise ValueError(f'another process runs a grid in {out}: wait for its end, or choose another --out.') from None


def _run_all(runs: list[Run], gpus: int, jobs: int) -> list[dict]:
    shares, stop = SimpleQueue(), threading.Event()
    for share in _shares(gpus, jobs):
        shares.put(share)

    def row(run: Run) -> dict:
        share = shares.get()
        try:
            return dict(cell=run.cell, seed=run.seed, **_run(run, gpus, share, stop))
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(row, run) for run in runs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _shares(gpus: int, jobs: int) -> list[dict[str, str]]:
    """Environment of each of ``jobs`` runs at a time: what the machine has, divided."""
    if jobs == 1:
        return [{}]
    if not gpus:
        return [dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', str(max(1, os.cpu_count() // jobs))))] * jobs
    visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(torch.cuda.device_count())))
    devices = [name for name in visible.split(',') if name]
    if len(devices) < gpus * jobs:
        raise ValueError(f'{jobs} runs at a time on {gpus} GPUs each need {gpus * jobs} GPUs, {len(devices)} are '
                         'visible: lower --jobs or --gpus.')
    port = int(os.environ.get('PORT', 29500))
    return [dict(CUDA_VISIBLE_DEVICES=','.join(devices[job * gpus:(job + 1) * gpus]), PORT=str(port + job))
            for job in range(jobs)]


def plan(grid: str | Path, out: Path) -> list[Run]:
    """Every run of ``grid``, merged and checked."""
    grid = Config.fromfile(config_path(str(grid)))
    if missing := {'config', 'seeds', 'cells'} - set(grid):
        raise ValueError(f'{grid.filename} lacks {sorted(missing)}: a grid names its config, seeds and cells.')
    seeds = grid.seeds
    if not (isinstance(seeds, (list, tuple)) and seeds and all(type(seed) is int for seed in seeds)
            and len(set(seeds)) == len(seeds)):
        raise ValueError(f'seeds of {grid.filename} are {seeds!r}: give a list of different integers, such as [0, 1].')
    if not (isinstance(grid.cells, dict) and grid.cells):
        raise ValueError(f'cells of {grid.filename} are {grid.cells!r}: give a dict of name -> what differs.')
    config = config_path(grid.config)
    if not Path(config).exists():
        config = str(Path(grid.filename).parent / config)
    base = Config.fromfile(config)
    folders, configs, runs = {}, {}, []
    for cell, difference in grid.cells.items():
        cell = str(cell)
        name = re.sub(r'\W+', '-', cell).strip('-')
        if not name or name in folders:
            raise ValueError(f"cell '{cell}' would have the folder '{name}'" + (
                f", and so has cell '{folders[name]}'" if name else '') + ': rename it, letters and digits count.')
        folders[name] = cell
        cfg = _merged(cell, config, difference)
        for seed in seeds:
            _seed(cfg, seed)
            run = Run(cell, seed, out / name / f'seed-{seed}', cfg.pretty_text)
            _check_folder(run)
            runs.append(run)
        _seed(base, seed)
        _check_new(cell, difference, cfg, base, configs)
    return runs


def _merged(cell: str, config: str, difference: dict) -> Config:
    if not isinstance(difference, dict):
        raise ValueError(f"cell '{cell}' is {difference!r}: give a dict of what differs, dict() for the recipe itself.")
    cfg = Config.fromfile(config)
    try:
        merge_checked(cfg, _options(difference))
    except (AttributeError, TypeError, KeyError, IndexError, AssertionError, ValueError) as error:
        # Every setting of a misspelt dict has the same fault.
        message = '\n'.join(dict.fromkeys(re.sub('--cfg-options .*?: ', '', str(error)).splitlines()))
        raise ValueError(f"cell '{cell}' cannot be merged into {config}: {message}") from error
    for key in ('test_evaluator', 'test_dataloader', 'test_cfg'):
        if cfg.get(key) is None:
            raise ValueError(f"cell '{cell}' of {config} has no {key} to compare runs by: a recipe needs "
                             'test_evaluator, test_dataloader and test_cfg.')
    return cfg


def _options(difference: dict, at: str = '') -> dict:
    """Path -> value, as --cfg-options has them. A dict with keys of its own kind, such as '.norm', stays whole."""
    options = {}
    for key, value in difference.items():
        is_open = isinstance(value, dict) and value and all(isinstance(name, str) and '.' not in name for name in value)
        options.update(_options(value, f'{at}{key}.') if is_open else {f'{at}{key}': value})
    return options


def _seed(cfg: Config, seed: int) -> None:
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)


def _check_new(cell: str, difference: dict, cfg: Config, base: Config, configs: dict[str, dict]) -> None:
    """Two cells of one config would stand in the table as two results; variables of a recipe are read by nothing."""
    content, recipe = ({key: cfg[key] for key in READ & set(cfg)} for cfg in (cfg, base))
    same = [f"cell '{other}'" for other in configs if configs[other] == content]
    if difference and content == recipe:
        same.append('the recipe itself (dict() is the cell for that)')
    if same:
        raise ValueError(f"cell '{cell}' trains what {' and '.join(same)} trains: correct or remove it. A variable of "
                         'the recipe, such as a pipeline, has no effect in a cell: set where it is used.')
    configs[cell] = content


def _begun(folder: Path) -> bool:
    return any((folder / name).exists() for name in ('metrics.json', 'last_checkpoint')) or any(folder.glob('*.pth'))


def _recipe(folder: Path) -> Path:
    """Beside the work folder, in which the Runner leaves a copy of its own."""
    return folder.with_suffix('.py')


def _check_folder(run: Run) -> None:
    recipe = _recipe(run.folder)
    if _begun(run.folder) and recipe.exists() and recipe.read_text() != run.recipe:
        raise ValueError(f'{run.folder} holds a run of another config, {recipe}: move both away, or choose another '
                         '--out.')


def _run(run: Run, gpus: int, share: dict[str, str], stop: threading.Event) -> dict[str, float | str]:
    """Metrics of one run, read where it has finished before."""
    folder, recipe = run.folder, _recipe(run.folder)
    result, clock, log = folder / 'metrics.json', folder / 'minutes', folder / 'train.log'
    if result.exists():
        print(f'{folder}: done before', flush=True)
        return _numbers(result)
    folder.mkdir(parents=True, exist_ok=True)
    if not _begun(folder) and recipe.exists() and recipe.read_text() != run.recipe:
        # The time of attempts with a config that has been corrected does not count; without a log none is missing.
        clock.write_text('0')
    recipe.write_text(run.recipe)
    # An attempt takes the file away and puts it back at its end: one that was killed at once leaves the time unknown.
    try:
        spent = float(clock.read_text()) if clock.exists() else None if log.exists() else 0.0
    except ValueError:  # killed while it was written
        spent = None
    clock.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        found = _measure(folder, recipe, gpus, share, stop)
    except (RuntimeError, FileNotFoundError) as error:
        print(f'{folder}: failed. {error}', flush=True)
        return dict(failed=str(error))
    finally:
        if spent is not None:
            spent += (time.monotonic() - start) / 60
            clock.write_text(str(spent))
    if spent is not None:
        found['minutes'] = spent
    # Under its name only when it is whole: what says that the run has finished.
    partial = result.with_suffix('.part')
    partial.write_text(json.dumps(found) + '\n')
    partial.replace(result)
    print(f'{folder}: ' + ', '.join(f'{name} {_number(value)}' for name, value in found.items()), flush=True)
    return found


def _measure(folder: Path, recipe: Path, gpus: int, share: dict[str, str],
             stop: threading.Event) -> dict[str, float]:
    """Train, test; the numbers among the metrics."""
    launch = ['bash', TOOLS / 'dist_train.sh', recipe, gpus] if gpus else [sys.executable, TOOLS / 'train.py', recipe]
    last = folder / 'last_checkpoint'
    # Not from the start on: --resume would drop the recipe's load_from.
    _call([*launch, '--work-dir', folder, *(['--resume'] if last.exists() else [])], folder / 'train.log', share, stop)
    if not last.exists():
        raise RuntimeError(f'training left no checkpoint in {folder}: the recipe needs a CheckpointHook; its log is '
                           f'{folder / "train.log"}')
    metrics, log = folder / 'tested.json', folder / 'test.log'
    _call([sys.executable, TOOLS / 'test.py', recipe, last.read_text(), '--work-dir', folder, '--out', metrics], log,
          share, stop)
    if not (found := _numbers(metrics)):
        raise RuntimeError(f'test_evaluator gave no number to compare runs by, but {metrics.read_text().strip()}; its '
                           f'log is {log}')
    return found


def _numbers(file: Path) -> dict[str, float]:
    return {name: value for name, value in (json.loads(file.read_text()) or {}).items() if type(value) in (int, float)}


def _call(command: list, log: Path, share: dict[str, str], stop: threading.Event) -> None:
    # Whose `python` dist_train.sh finds.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    env = {**os.environ, **share, 'PATH': path}
    with log.open('a') as file:
        begin = file.tell()
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                if stop.wait(0.1):
                    raise KeyboardInterrupt
        finally:
            # Interrupted: a trainer left behind would write into the folder beside that of the next attempt.
            process.terminate()
            process.wait()
    if process.returncode:
        text = log.read_bytes()[begin:].decode(errors='replace')
        errors = re.findall(r'^(?:\[rank\d+\]: *)?((?:\w+\.)*\w+Error: .*)', text, re.MULTILINE)
        last = errors[-1] if errors else '\n'.join(text.splitlines()[-3:])
        if last.startswith('FileNotFoundError'):
            last += '\nThe head of the grid says what has to be run before.'
        raise RuntimeError(f'{" ".join(map(str, command))} failed; its log is {log} and ends with\n{last}')


def summarise(rows: list[dict]) -> list[dict]:
    """Per cell: ``cell``, ``runs``, ``failed`` (both counts), and mean and sample standard deviation over seeds of
    every metric that a run of it has."""
    summary = []
    for cell in dict.fromkeys(row['cell'] for row in rows):
        runs = [row for row in rows if row['cell'] == cell and 'failed' not in row]
        failed = sum(row['cell'] == cell for row in rows) - len(runs)
        summary.append(dict(cell=cell, runs=len(runs), failed=failed))
        for name in metric_names(rows):
            if values := [row[name] for row in runs if name in row]:
                summary[-1][name] = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None
    return summary


def metric_names(rows: list[dict]) -> list[str]:
    """Of all rows, as they come, the minutes last."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in ('cell', 'seed', 'failed', 'minutes')] + ['minutes']


def _number(value: float) -> str:
    return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def as_markdown(rows: list[dict]) -> str:
    names = metric_names(rows)
    lines = [['cell', 'runs', *names], ['---', *['---:'] * (1 + len(names))]]
    for entry in summarise(rows):
        count = f'{entry["runs"]}, {entry["failed"]} failed' if entry['failed'] else str(entry['runs'])
        lines.append([entry['cell'], count])
        for name in names:
            mean, deviation = entry.get(name, (None, None))
            lines[-1].append(('' if entry['runs'] else 'failed') if mean is None else
                             _number(mean) + ('' if deviation is None else f' ± {_number(deviation)}'))
    lines = [[word.replace('|', r'\|') for word in line] for line in lines]
    return ''.join(f'|{"|".join(line)}|\n' if line[0] == '---' else f'| {" | ".join(line)} |\n' for line in lines)


def write(rows: list[dict], out: Path) -> None:
    """``table.md``, ``table.csv`` (one line per run) and, where a run has finished, ``figure.png``."""
    names = metric_names(rows)
    (out / 'table.md').write_text(as_markdown(rows))
    with (out / 'table.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ['cell', 'seed', *names])
        writer.writeheader()
        for row in rows:
            failed = dict.fromkeys(names, 'failed') if 'failed' in row else {}
            writer.writerow({**{name: value for name, value in row.items() if name != 'failed'}, **failed})
    if len(names) > 1:
        draw(rows, out / 'figure.png')


def draw(rows: list[dict], path: Path) -> None:
    """One panel per metric: every run a dot, every cell's mean a bar across."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    names, cells = metric_names(rows)[:-1], list(dict.fromkeys(row['cell'] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(1.5 + 3.5 * len(names), 1 + 0.4 * len(cells)), sharey=True,
                                squeeze=False, layout='constrained')
    for ax, name in zip(axes[0], names):
        for index, cell in enumerate(cells):
            values = [row[name] for row in rows if row['cell'] == cell and name in row]
            ax.plot(values, [index] * len(values), 'o', color='#0072B2', alpha=0.7)
            ax.plot([np.mean(values or np.nan)] * 2, [index - 0.3, index + 0.3], color='#D55E00', linewidth=2)
        ax.set_yticks(range(len(cells)), cells)
        ax.set_xlabel(name)
        ax.grid(axis='x', alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)
