"""Long runs as a user has them: killed, resumed, changed, replayed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from .test_train_cli import ROOT, iterations, run, start, train, weights

pytestmark = pytest.mark.slow
TRAIN = [sys.executable, ROOT / 'tools/train.py']


def begin(config, *options):
    """The trainer in a process of its own, after its first logged iteration."""
    process = subprocess.Popen([str(part) for part in (*TRAIN, config, *options)], cwd=config.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    for line in process.stdout:
        if 'Epoch(train)' in line:
            return process
    raise AssertionError(f'ended with {process.wait()} before its first iteration')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_train__stopped_by_a_signal_and_resumed_to_the_same_weights(config, number):
    options = ['--cfg-options', 'train_cfg.max_epochs=20', 'default_hooks.checkpoint.interval=20']
    train(config, '--work-dir', 'whole', *options)
    process = begin(config, '--work-dir', 'cut', *options)
    process.send_signal(number)
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + number, rest
    assert f'{number.name}: ' in rest and 'go on with --resume' in rest
    assert sorted(path.name for path in (config.parent / 'cut').glob('*.pth*')) == [
        'interrupted.pth', 'interrupted.pth.sha256']
    train(config, '--work-dir', 'cut', '--resume', *options)
    one, two = (weights(config, 'epoch_20.pth', folder) for folder in ('whole', 'cut'))
    assert [name for name, x in one.items() if not torch.equal(x, two[name])] == []


def test_train__two_processes_stopped_through_their_launcher(config):
    from .test_train_cli import free_port
    env = {**os.environ, 'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}', 'PORT': free_port(),
           'CUDA_VISIBLE_DEVICES': ''}
    options = ['--work-dir', 'two', '--cfg-options', 'train_cfg.max_epochs=2000',
               'default_hooks.checkpoint.interval=2000']
    process = subprocess.Popen([ROOT / 'tools/dist_train.sh', config, '2', *options], cwd=config.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    for line in process.stdout:
        if 'Epoch(train)' in line:
            break
    process.terminate()
    rest = process.communicate(timeout=300)[0]
    assert process.returncode not in (0, -signal.SIGKILL), rest
    assert (config.parent / 'two/last_checkpoint').read_text().endswith('two/interrupted.pth'), rest


def test_train__each_of_two_processes_leaves_with_the_code_of_the_signal(config):
    from .test_train_cli import free_port
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(), 'WORLD_SIZE': '2',
           'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [*TRAIN, config, '--launcher', 'pytorch', '--work-dir', 'two', '--cfg-options',
               'train_cfg.max_epochs=2000', 'default_hooks.checkpoint.interval=2000']
    files = [(config.parent / f'said-{rank}.txt').open('w+') for rank in range(2)]
    processes = [subprocess.Popen([str(part) for part in command], cwd=config.parent, stdout=file, stderr=file,
                                  env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)})
                 for rank, file in enumerate(files)]
    end = time.monotonic() + 200
    while ('Epoch(train)' not in (config.parent / 'said-0.txt').read_text() and time.monotonic() < end
           and processes[0].poll() is None):
        time.sleep(0.5)
    processes[1].terminate()
    codes = [process.wait(timeout=100) for process in processes]
    assert codes == [143, 143], [(config.parent / f'said-{rank}.txt').read_text()[-2000:] for rank in range(2)]
    assert (config.parent / 'two/interrupted.pth').exists()


def test_train__another_loss_is_refused_and_allowed_by_name(config):
    train(config, '--cfg-options', 'train_cfg.max_epochs=1')
    changed = ['--resume', '--cfg-options', 'model.losses.relation.loss_weight=0.5']
    done = start([*TRAIN, config, *changed], config.parent)
    assert done.returncode == 1
    assert 'ValueError: the checkpoint is of a run with other losses (before -> now):' in done.stderr
    assert '  model.losses.relation.loss_weight: 0.3 -> 0.5' in done.stderr
    log = train(config, *changed, '--allow-changed', 'losses')
    assert 'the resumed run differs from its checkpoint' in log
    assert list(iterations(log))[0] == (2, 1)
    manifest = json.loads((config.parent / 'work_dirs/tiny/manifest.json').read_text())
    assert manifest['config']['model']['losses']['relation']['loss_weight'] == 0.5
    assert manifest['data']['count'] == 8 and len(manifest['data']['names']) == 64


def test_replay__of_a_run_that_diverges(config):
    options = ['--cfg-options', 'optim_wrapper.optimizer.lr=1e30']
    done = start([*TRAIN, config, *options], config.parent)
    assert done.returncode == 1 and 'steps in a row: training ends' in done.stderr
    folder = config.parent / 'work_dirs/tiny/nonfinite'
    first, *later = sorted(folder.glob('*.json'), key=lambda path: int(path.stem.split('_')[1]))
    record = json.loads(first.read_text())
    begun = time.monotonic()
    text = run([sys.executable, ROOT / 'tools/replay.py', config, first, *options], config.parent)
    assert time.monotonic() - begun < 300
    assert f'iteration {record["iteration"] + 1}, process 0, samples {[i for i, _ in record["samples"]]}' in text
    for name, value in record['losses'].items():
        assert f'{name}: {value:.6g} (recorded: {value:.6g})' in text
    assert 'backbone.layers.0 ' in text and f'gradients that are not finite: {record["gradients"][0]}' in text
    other = start([sys.executable, ROOT / 'tools/replay.py', config, later[0], *options], config.parent)
    assert other.returncode == 1 and f'{later[0]} has no checkpoint beside it' in other.stderr
