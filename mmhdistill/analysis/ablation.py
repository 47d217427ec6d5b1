"""A grid of training runs that differ in a word: run, resumed, compared."""
import csv
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mmengine.config import Config

from ..compat import config_path

TOOLS = Path(__file__).parents[1] / '.mim/tools'


def run_grid(grid: str | Path, out: Path, gpus: int = 0) -> list[dict]:
    """Train and test every cell of ``grid`` with every seed, one after the other, in ``out``; finished ones are left.

    Args:
        grid: a config with ``config`` (the recipe that all cells share), ``seeds`` and ``cells``, name -> what differs.
        gpus: processes of each run; 0 trains in one without a launcher.

    Returns:
        One row per run: ``cell``, ``seed``, ``minutes`` and the metrics of the recipe's ``test_evaluator``.

    Raises:
        ValueError: a folder of ``out`` holds a run of another config.
        RuntimeError: a run failed; those before it are kept.
    """
    grid = Config.fromfile(grid)
    if missing := {'config', 'seeds', 'cells'} - set(grid):
        raise ValueError(f'{grid.filename} lacks {sorted(missing)}: a grid names its config, seeds and cells.')
    rows = []
    for cell, difference in grid.cells.items():
        for seed in grid.seeds:
            folder = out / re.sub(r'\W+', '-', cell).strip('-') / f'seed-{seed}'
            rows.append(dict(cell=cell, seed=seed, **_run(grid.config, difference, seed, folder, gpus)))
    return rows


def _run(config: str, difference: dict, seed: int, folder: Path, gpus: int) -> dict[str, float]:
    """Metrics of one run, read where it has finished before."""
    cfg = Config.fromfile(config_path(config))
    cfg.merge_from_dict(dict(difference))
    cfg.merge_from_dict({'randomness.seed': seed})
    if cfg.get('test_evaluator') is None:
        raise ValueError(f'{config} has no test_evaluator to compare runs by: add one, with test_dataloader and '
                         'test_cfg.')
    # Beside the work folder, in which the Runner leaves a copy of its own.
    recipe, result = folder.with_suffix('.py'), folder / 'metrics.json'
    if recipe.exists() and recipe.read_text() != cfg.pretty_text:
        raise ValueError(f'{folder} holds a run of another config, {recipe}: move both away, or choose another --out.')
    if result.exists():
        print(f'{folder}: done before', flush=True)
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write_text(cfg.pretty_text)
    start = time.monotonic()
    launch = ['bash', TOOLS / 'dist_train.sh', recipe, gpus] if gpus else [sys.executable, TOOLS / 'train.py', recipe]
    _call([*launch, '--work-dir', folder, '--resume'], folder / 'train.log')
    checkpoint = (folder / 'last_checkpoint').read_text()
    metrics = folder / 'tested.json'
    _call([sys.executable, TOOLS / 'test.py', recipe, checkpoint, '--work-dir', folder, '--out', metrics],
          folder / 'test.log')
    found = dict(minutes=(time.monotonic() - start) / 60, **json.loads(metrics.read_text()))
    # Under its name only when it is whole: what says that the run has finished.
    partial = result.with_suffix('.part')
    partial.write_text(json.dumps(found) + '\n')
    partial.replace(result)
    print(f'{folder}: ' + ', '.join(f'{name} {value:.2f}' for name, value in found.items()), flush=True)
    return found


def _call(command: list, log: Path) -> None:
    with log.open('a') as file:
        done = subprocess.run([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last = '\n'.join(log.read_text().splitlines()[-3:])
        raise RuntimeError(f'{" ".join(map(str, command))} failed; its log is {log} and ends with\n{last}')


def summarise(rows: list[dict]) -> list[dict]:
    """Per cell: ``cell``, ``runs``, and mean and sample standard deviation over seeds of every metric."""
    summary = []
    for cell in dict.fromkeys(row['cell'] for row in rows):
        runs = [row for row in rows if row['cell'] == cell]
        summary.append(dict(cell=cell, runs=len(runs)))
        for name in metric_names(rows):
            values = [row[name] for row in runs]
            summary[-1][name] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    return summary


def metric_names(rows: list[dict]) -> list[str]:
    return [name for name in rows[0] if name not in ('cell', 'seed', 'minutes')] + ['minutes']


def as_markdown(rows: list[dict]) -> str:
    names = metric_names(rows)
    lines = [f'| cell | runs | {" | ".join(names)} |', f'|---|---:|{"---:|" * len(names)}']
    for entry in summarise(rows):
        cells = [f'{mean:.2f}' + ('' if deviation is None else f' ± {deviation:.2f}')
                 for mean, deviation in (entry[name] for name in names)]
        lines.append(f'| {entry["cell"]} | {entry["runs"]} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def write(rows: list[dict], out: Path) -> None:
    """``table.md``, ``table.csv`` (one line per run) and ``figure.png``."""
    (out / 'table.md').write_text(as_markdown(rows))
    with (out / 'table.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ['cell', 'seed', *metric_names(rows)])
        writer.writeheader()
        writer.writerows(rows)
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
            values = [row[name] for row in rows if row['cell'] == cell]
            ax.plot(values, [index] * len(values), 'o', color='#0072B2', alpha=0.7)
            ax.plot([statistics.mean(values)] * 2, [index - 0.3, index + 0.3], color='#D55E00', linewidth=2)
        ax.set_yticks(range(len(cells)), cells)
        ax.set_xlabel(name)
        ax.grid(axis='x', alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)
