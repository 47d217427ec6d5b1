"""A grid is run cell by cell, goes on where it was killed, and ends in one table."""
import csv
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest

from .conftest import ROOT
from .test_train_cli import start

GRID = """
config = '{config}'
seeds = [0, 1]
cells = {{
    'both, masked': dict(),
    'features': dict(model=dict(losses=dict(relation=None), masker=None), custom_hooks=[]),
}}
"""
RUNS = ['both-masked/seed-0', 'both-masked/seed-1', 'features/seed-0', 'features/seed-1']


@pytest.fixture
def grid(config):
    config.write_text(config.read_text().replace('max_epochs=2', 'max_epochs=1'))
    path = config.parent / 'grid.py'
    path.write_text(GRID.format(config=config))
    return path


def command(grid):
    return [sys.executable, str(ROOT / 'tools/ablate.py'), str(grid), '--out', str(grid.parent / 'out')]


@pytest.mark.slow
def test_ablate__killed_in_the_middle_finishes_what_is_missing(grid):
    out = grid.parent / 'out'
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    process = subprocess.Popen(command(grid), cwd=grid.parent, env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    # Killed with its children while the second run trains.
    end = time.monotonic() + 400
    while not (out / RUNS[1] / 'train.log').exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [run for run in RUNS if (out / run / 'metrics.json').exists()] == RUNS[:1]
    first = (out / RUNS[0] / 'metrics.json').stat().st_mtime_ns
    log = (out / RUNS[0] / 'train.log').read_bytes()

    done = start(command(grid), grid.parent)
    assert done.returncode == 0, done.stderr
    assert re.findall(r'(\S+): done before', done.stdout) == [str(out / RUNS[0])]
    assert (out / RUNS[0] / 'metrics.json').stat().st_mtime_ns == first
    assert (out / RUNS[0] / 'train.log').read_bytes() == log
    rows = list(csv.DictReader((out / 'table.csv').open()))
    assert [(row['cell'], row['seed']) for row in rows] == [
        ('both, masked', '0'), ('both, masked', '1'), ('features', '0'), ('features', '1')]
    for row, run in zip(rows, RUNS):
        measured = json.loads((out / run / 'metrics.json').read_text())
        # How long the run took that was killed is not known.
        assert set(measured) == {'knn/patch', 'knn/cls', *([] if run == RUNS[1] else ['minutes'])}
        assert {name: float(row[name]) for name in measured} == pytest.approx(measured)
    mean = sum(float(row['knn/patch']) for row in rows[:2]) / 2
    assert re.search(rf'\| both, masked \| 2 \| {mean:.4g} ± ', (out / 'table.md').read_text())
    assert (out / 'figure.png').stat().st_size > 5000
    # The cells differ in their losses, the seeds in their weights.
    trained = [re.findall(r'loss/(\w+):', (out / run / 'train.log').read_text()) for run in RUNS]
    assert [set(losses) for losses in trained] == 2 * [{'feature', 'relation'}] + 2 * [{'feature'}]

    # Another recipe is not mixed in.
    grid.write_text(grid.read_text().replace('dict(),', 'dict(train_cfg=dict(max_epochs=3)),', 1))
    done = start(command(grid), grid.parent)
    assert done.returncode == 1
    assert f'{out / RUNS[0]} holds a run of another config, {out / RUNS[0]}.py: move both away' in done.stderr
    assert (out / RUNS[0] / 'metrics.json').stat().st_mtime_ns == first


@pytest.mark.slow
def test_ablate__failed_run_names_its_log(grid):
    text = grid.read_text().replace('masker=None', 'backbone=dict(patch_size=5)').replace('[0, 1]', '[7]')
    grid.write_text(text.replace("    'both, masked': dict(),\n", ''))
    done = start(command(grid), grid.parent)
    log = grid.parent / 'out/features/seed-7/train.log'
    assert done.returncode == 1
    assert f'failed; its log is {log} and ends with' in done.stderr
    assert "1 of 1 runs failed; the same command tries them again\ncell 'features', seed 7: " in done.stderr
    assert 'Traceback' not in done.stderr
    assert (grid.parent / 'out/table.csv').read_text().splitlines() == ['cell,seed,minutes', 'features,7,failed']


def test_ablate__misspelt_key_of_a_cell(grid, monkeypatch):
    grid.write_text(grid.read_text().replace('masker=None', 'masker=dict(keep_rat=0.5)'))
    monkeypatch.setattr(sys, 'argv', command(grid)[1:])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(sys.argv[0], run_name='__main__')
    first, second = error.value.code.splitlines()
    assert first.startswith("ablate.py: cell 'features' cannot be merged into ")
    assert second.startswith("model.masker: no 'keep_rat' is taken: did you mean 'keep_rate'? There is ")
    assert not (grid.parent / 'out').exists()


@pytest.mark.parametrize('sent, jobs', [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_ablate__stopped_ends_its_trainers(tmp_path, sent, jobs):
    # The tool, with trainers that say who they are and wait.
    (tmp_path / 'train.py').write_text("""
import os, pathlib, time
path = pathlib.Path(__file__).with_name(f'part-{os.getpid()}')
path.write_text('')
path.rename(path.with_name(f'pid-{os.getpid()}'))
time.sleep(100)
""")
    (tmp_path / 'recipe.py').write_text('test_evaluator = test_dataloader = test_cfg = dict()\n')
    (tmp_path / 'grid.py').write_text("config = 'recipe.py'\nseeds = [0, 1]\ncells = dict(a=dict())\n")
    (tmp_path / 'ablate.py').write_text(f"""
import pathlib, runpy
from mmhdistill.analysis import ablation
ablation.TOOLS = pathlib.Path('{tmp_path}')
runpy.run_path('{ROOT}/tools/ablate.py', run_name='__main__')
""")
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    process = subprocess.Popen([sys.executable, 'ablate.py', 'grid.py', '--out', 'out', '--jobs', str(jobs)],
                               cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(trainers := list(tmp_path.glob('pid-*'))) < jobs:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert 'ablate.py: interrupted; the same command goes on from here' in said
    # None has begun after.
    assert sorted(tmp_path.glob('pid-*')) == sorted(trainers)
    for path in trainers:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name[4:]), 0)
    # The time until then counts.
    for seed in range(jobs):
        assert 0 < float((tmp_path / f'out/a/seed-{seed}/minutes').read_text()) < 2
