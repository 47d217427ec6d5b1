"""The command-line tools, run as a user runs them, on a folder of random images."""
import json
import logging
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import RUNNERS

from .conftest import ITERS

ROOT = Path(__file__).parents[2]


def start(command, folder, **env):
    bin_folder = str(Path(sys.executable).parent)
    return subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
             'PATH': f"{bin_folder}{os.pathsep}{os.environ['PATH']}", **env})


def run(command, folder, **env):
    """Output of a command that must succeed."""
    done = start(command, folder, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(config, *options):
    return run([sys.executable, ROOT / 'tools/train.py', config, *options], config.parent)


def iterations(log):
    """What each training iteration logged, (epoch, iteration) -> name -> value."""
    found = {}
    for line in log.splitlines():
        match = re.search(r'Epoch\(train\)\s+\[(\d+)\]\[(\d+)/\d+\]\s+(.*)', line)
        if match:
            values = re.findall(r'([\w/]+): ([-+.\de]+)(?=\s|$)', match[3])
            found[int(match[1]), int(match[2])] = {name: float(value) for name, value in values}
            assert 'eta: ' in match[3]
    return found


def weights(config, name='epoch_2.pth', work_dir='work_dirs/tiny'):
    return torch.load(config.parent / work_dir / name, weights_only=True)['state_dict']


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return str(listener.getsockname()[1])


@pytest.mark.slow
def test_train__logs_losses_and_keep_rate_and_resumes_to_the_same_weights(config):
    log = train(config)
    whole = iterations(log)
    # Four blocks of twelve tensors, and six around them.
    receipt = r"teacher '(\w+)': .*\n  file     \S+\n  sha256   (\w{64}), .*\n  tensors  54/54, mmpretrain format, "
    receipts = dict(re.findall(receipt, log))
    kept, = (config.parent / 'work_dirs/tiny').glob('*/teachers.json')
    assert {name: teacher['sha256'] for name, teacher in json.loads(kept.read_text()).items()} == receipts
    assert len(receipts) == 2
    assert list(whole) == [(epoch, step) for epoch in (1, 2) for step in range(1, ITERS + 1)]
    for index, logged in enumerate(whole.values()):
        assert logged['loss'] == pytest.approx(logged['loss/feature'] + logged['loss/relation'], abs=2e-4)
        assert logged['loss/feature'] > 0
        assert logged['keep_rate'] == pytest.approx(1 - 0.2 * index / 8, abs=1e-4)
        assert logged['lr'] == 1e-3
    # The patches of a 8x8 grid; 64 * (1 - 0.2 * 7 / 8)^3 = 35.9.
    assert [whole[1, 1]['kept_tokens'], whole[2, ITERS]['kept_tokens']] == [64, 36]
    expected = weights(config)

    # The second half again, from the checkpoint of the first.
    (config.parent / 'work_dirs/tiny/epoch_2.pth').unlink(missing_ok=True)
    first = config.parent / 'work_dirs/tiny/epoch_1.pth'
    assert first.exists()
    (config.parent / 'work_dirs/tiny/last_checkpoint').write_text(str(first))
    second = iterations(train(config, '--resume'))
    timing = ('time', 'data_time', 'eta')
    assert list(second) == [(2, step) for step in range(1, ITERS + 1)]
    for step, logged in second.items():
        assert {name: x for name, x in logged.items() if name not in timing} == {
            name: x for name, x in whole[step].items() if name not in timing}
    resumed = weights(config)
    assert [name for name, x in resumed.items() if not torch.equal(x, expected[name])] == []


@pytest.mark.slow
def test_train__gradient_accumulation_and_learning_rate_scaling(config):
    # 2 of 8 images: a quarter of the rate.
    plain = iterations(train(config, '--auto-scale-lr', '--cfg-options', 'train_cfg.max_epochs=1'))
    assert {logged['lr'] for logged in plain.values()} == {2.5e-4}
    # Four steps of two images are the eight that the rate is meant for, and make one update.
    log = train(config, '--auto-scale-lr', '--work-dir', 'accumulated', '--cfg-options', 'train_cfg.max_epochs=1',
                f'optim_wrapper.accumulative_counts={ITERS}', 'default_hooks.checkpoint.by_epoch=False')
    found = iterations(log)
    states = [weights(config, f'iter_{step}.pth', 'accumulated') for step in range(1, ITERS + 1)]
    moved = [any(not torch.equal(x, states[0][name]) for name, x in state.items()) for state in states]
    assert moved == [False, False, False, True]
    assert {logged['lr'] for logged in found.values()} == {1e-3}


@pytest.mark.slow
def test_train__auto_scale_lr_without_base_batch_size(config):
    config.write_text(config.read_text().replace('dict(base_batch_size=8)', 'dict(_delete_=True)'))
    done = start([sys.executable, ROOT / 'tools/train.py', config, '--auto-scale-lr'], config.parent)
    assert done.returncode == 1
    assert f'--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=...) in {config}' in done.stderr


@pytest.mark.slow
def test_train__config_by_package_name(config):
    command = [sys.executable, ROOT / 'tools/train.py', 'mmhdistill::quickstart/hdistill_vit-photos.py']
    options = [
        f'model.teachers.supervised.checkpoint={config.parent}/data/supervised.pth',
        f'model.teachers.mae.checkpoint={config.parent}/data/mae.pth',
        f'train_dataloader.dataset.data_root={config.parent}/data/train', 'train_dataloader.batch_size=4',
        'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False', 'train_cfg.max_epochs=2',
        'default_hooks.logger.interval=1'
    ]
    first = iterations(run([*command, '--cfg-options', *options], config.parent))[1, 1]
    assert 0 < first['loss/feature'] < 10
    assert 0 < first['loss/relation'] < 10
    assert [path.name for path in (config.parent / 'work_dirs').iterdir()] == ['hdistill_vit-photos']


@pytest.mark.slow
def test_test__prints_and_writes_the_metrics(config):
    train(config, '--cfg-options', 'train_cfg.max_epochs=1')
    log = run([sys.executable, ROOT / 'tools/test.py', config, 'work_dirs/tiny/epoch_1.pth', '--out', 'metrics.json'],
              config.parent)
    metrics = json.loads((config.parent / 'metrics.json').read_text())
    assert set(metrics) == {'knn/patch', 'knn/cls'}
    for name, value in metrics.items():
        # Six query images.
        assert value * 6 / 100 == pytest.approx(round(value * 6 / 100), abs=1e-9)
        assert f'{name}: {value:.4f}' in log
    # The folder of the training, and its config, are as they were.
    assert (config.parent / 'work_dirs/tiny/test').is_dir()
    other = start([sys.executable, ROOT / 'tools/test.py', config, 'work_dirs/tiny/epoch_1.pth', '--cfg-options',
                   'model.backbone.patch_size=16'], config.parent)
    assert other.returncode == 1 and 'patch_embed.projection.weight: ' in other.stderr
    assert 'patch_size=16' not in (config.parent / 'work_dirs/tiny' / config.name).read_text()


class Built:
    """Stands for the Runner of a tool, which ends with what it asks of it."""

    def __init__(self, cfg):
        self.cfg, self.said = cfg, []
        self.logger = logging.Logger('built')
        self.logger.warning = self.said.append

    def __getattr__(self, name):
        raise SystemExit(name)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """What a tool builds of the config that a resumed run left, called with more words."""
    found = []

    def of(tool, *words, more=''):
        (tmp_path / 'copy.py').write_text(f"resume = True\nload_from = 'first.pth'\ntest_dataloader = dict()\n{more}\n")
        monkeypatch.setattr(RUNNERS, 'build', lambda cfg: found.append(Built(cfg)) or found[-1])
        monkeypatch.setattr(sys, 'argv', [tool, str(tmp_path / 'copy.py'), *words])
        with pytest.raises(SystemExit, match='^(train_loop|register_hook)$'):
            runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
        return found[-1]

    return of


AUTO = 'mmhdistill.auto_amp_optim_wrapper'


@pytest.mark.parametrize('before, word, after', [
    (dict(type='OptimWrapper', clip_grad=None), '--amp', dict(type=AUTO, clip_grad=None)),
    (dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=4.0), '--amp', dict(type=AUTO)),
    # What a detector needs.
    (dict(type='AmpOptimWrapper', dtype='float16', loss_scale=4.0), '--amp', dict(type=AUTO, dtype='float16')),
    (dict(type=AUTO, dtype='float16'), '--amp', dict(type=AUTO, dtype='float16')),
    (dict(type=AUTO, dtype='float16'), '--no-amp', dict(type='OptimWrapper')),
    (dict(type='AmpOptimWrapper', dtype='float16', loss_scale=4.0), '--no-amp', dict(type='OptimWrapper'))])
def test_train__precision_on_request(before, word, after, built):
    assert built('train.py', word, more=f'optim_wrapper = {before}').cfg.optim_wrapper == after


def test_train__a_config_that_says_resume_itself_is_told(built):
    runner = built('train.py', '--work-dir', 'new')
    assert (runner.cfg.resume, runner.cfg.load_from) == (True, 'first.pth')
    assert runner.said == ['the config itself says resume=True: training goes on from first.pth; for a new run, '
                           '--cfg-options resume=False load_from=None']
    runner = built('train.py', '--work-dir', 'new', '--cfg-options', 'load_from=None')
    assert 'training goes on from the latest checkpoint in new; ' in runner.said[0]


@pytest.mark.parametrize('words, expected', [
    (['--resume', 'second.pth'], (True, 'second.pth')), (['--resume'], (True, None)),
    (['--cfg-options', 'resume=False', 'load_from=None'], (False, None))])
def test_train__what_the_command_says_of_resume_counts(words, expected, built):
    runner = built('train.py', *words)
    assert (runner.cfg.resume, runner.cfg.load_from) == expected and runner.said == []


def test_test__never_resumes(built):
    """Which would read the training data, and refuse a checkpoint of another student."""
    runner = built('test.py', 'epoch_2.pth')
    assert (runner.cfg.resume, runner.cfg.load_from) == (False, 'epoch_2.pth')


@pytest.mark.slow
def test_test__config_without_test_dataloader(config):
    config.write_text(config.read_text().replace('test_cfg = dict()', 'test_cfg = test_dataloader = None'))
    done = start([sys.executable, ROOT / 'tools/test.py', config, 'none.pth'], config.parent)
    assert done.returncode == 1
    assert f'{config} has no test_dataloader: add one with test_cfg and test_evaluator.' in done.stderr


@pytest.mark.slow
def test_dist__two_processes_equal_one_with_twice_the_batch(config):
    run([ROOT / 'tools/dist_train.sh', config, 2, '--work-dir', 'two'], config.parent, PORT=free_port())
    log = next((config.parent / 'two').glob('*/*.log')).read_text()
    found = iterations(log)
    assert list(found) == [(epoch, step) for epoch in (1, 2) for step in (1, 2)]
    train(config, '--work-dir', 'one', '--cfg-options', 'train_dataloader.batch_size=4')
    single = iterations(next((config.parent / 'one').glob('*/*.log')).read_text())
    # The first batch is the same four images at the same weights; each process logs its own half.
    assert found[1, 1]['keep_rate'] == single[1, 1]['keep_rate'] == 1
    one, two = (weights(config, 'epoch_1.pth', folder) for folder in ('one', 'two'))
    difference = sum((one[name] - x).abs().sum() for name, x in two.items()) / sum(x.abs().sum() for x in two.values())
    assert difference < 1e-4

    run([ROOT / 'tools/dist_test.sh', config, 'two/epoch_2.pth', 2, '--out', 'two.json'], config.parent,
        PORT=free_port())
    run([sys.executable, ROOT / 'tools/test.py', config, 'two/epoch_2.pth', '--out', 'one.json'], config.parent)
    assert json.loads((config.parent / 'two.json').read_text()) == json.loads((config.parent / 'one.json').read_text())


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh'])
def test_dist__usage_without_arguments(script):
    done = start([ROOT / 'tools' / script], ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(f'tools/{script} CONFIG ')
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.slow
def test_dist_train__two_nodes_of_one_process(config):
    port, files = free_port(), [config.parent / f'node{rank}.log' for rank in (0, 1)]
    # Both write to files: a pipe that nobody reads yet could fill, and a node that waits for the other says why.
    nodes = [subprocess.Popen(
        ['bash', ROOT / 'tools/dist_train.sh', config, '1', '--work-dir', f'node{rank}', '--cfg-options',
         'train_cfg.max_epochs=1'], cwd=config.parent, stdout=file.open('w'), stderr=subprocess.STDOUT,
        env={**os.environ, 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}", 'NNODES': '2',
             'NODE_RANK': str(rank), 'MASTER_ADDR': '127.0.0.1', 'PORT': port})
        for rank, file in enumerate(files)]
    try:
        for node in nodes:
            node.wait(timeout=300)
    except subprocess.TimeoutExpired:
        pytest.fail('\n'.join(f'node {rank} ({node.poll()}):\n{file.read_text()}'
                              for rank, (node, file) in enumerate(zip(nodes, files, strict=True))))
    finally:
        for node in nodes:
            node.terminate()
    logs = [file.read_text() for file in files]
    assert [node.returncode for node in nodes] == [0, 0], logs
    # The images are shared out: half the steps of one process.
    steps = [list(iterations(log)) for log in logs]
    assert steps[0] == [(1, step) for step in range(1, ITERS // 2 + 1)]
    assert (config.parent / 'node0/epoch_1.pth').exists() and not (config.parent / 'node1/epoch_1.pth').exists()


def test_slurm_train__asks_for_what_is_written(config, tmp_path):
    bin_dir = tmp_path / 'bin'
    bin_dir.mkdir()
    (bin_dir / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (bin_dir / 'srun').chmod(0o755)
    done = subprocess.run(
        ['bash', ROOT / 'tools/slurm_train.sh', 'gpus', 'my-job', config, 'out', '--resume'], cwd=config.parent,
        capture_output=True, text=True, check=True,
        env={**os.environ, 'PATH': f'{bin_dir}:{os.environ["PATH"]}', 'GPUS': '16',
             'SRUN_ARGS': '--constraint=a100'})
    asked = done.stdout.splitlines()
    train = asked.index('python')
    assert asked[:train] == ['-p', 'gpus', '--job-name=my-job', '--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8',
                             '--cpus-per-task=8', '--kill-on-bad-exit=1', '--constraint=a100']
    assert asked[train:] == ['python', '-u', f'{ROOT}/tools/train.py', str(config), '--work-dir=out', '--launcher',
                             'slurm', '--resume']


@pytest.mark.slow
def test_train__fewer_images_than_a_batch(config):
    done = subprocess.run([sys.executable, ROOT / 'tools/train.py', config, '--cfg-options',
                           'train_dataloader.batch_size=9', 'train_dataloader.drop_last=True'], cwd=config.parent,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('8 images make no full batch of 9 for every process')


def test_train__folder_of_images_that_is_not_there(config):
    done = start([sys.executable, ROOT / 'tools/train.py', config, '--cfg-options',
                  'train_dataloader.dataset.data_root=nowhere'], config.parent)
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr and 'nowhere' in done.stderr.splitlines()[-1]
