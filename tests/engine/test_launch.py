import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmhdistill.engine.launch import FittingCheckpoint, leave, prepare


@pytest.fixture
def groups(monkeypatch):
    """The back ends of the process groups that would have been made."""
    made = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', made.append)
    return made


@pytest.fixture
def runner():
    return SimpleNamespace(model=torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(1, 1))))


def config(folder, **kwargs):
    path = folder / 'my_config.py'
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in kwargs.items()))
    return Config.fromfile(path)


def test_prepare__one_process(tmp_path, groups):
    cfg = config(tmp_path)
    prepare(cfg, 'none', None)
    assert (cfg.launcher, cfg.work_dir) == ('none', 'work_dirs/my_config')
    assert groups == []
    assert 'model_wrapper_cfg' not in cfg


def test_leave__a_group_or_none(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    for _ in range(2):
        leave()
        assert not torch.distributed.is_initialized()


LATE = """
import atexit
import ctypes
import sys
import time

rank = int(sys.argv[1])
if rank:
    # The last that the interpreter does before it ends, without giving its lock away.
    atexit.register(ctypes.PyDLL(None).usleep, 500000)

import torch

from mmhdistill.engine.launch import leave

torch.distributed.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
# As DDP does, it keeps the threads of the group alive.
group = torch.distributed.group.WORLD
if rank:
    # A thread of gloo needs the lock to free the tensor, once the other process has done its part.
    torch.distributed.all_reduce(torch.ones(1), async_op=True)
else:
    time.sleep(0.1)
    torch.distributed.all_reduce(torch.ones(1))
leave()
"""


def test_leave__a_thread_of_gloo_frees_its_tensors_before_the_interpreter_ends(tmp_path):
    (tmp_path / 'late.py').write_text(LATE)
    processes = [subprocess.Popen(
        [sys.executable, 'late.py', str(rank), tmp_path / 'rendezvous'], cwd=tmp_path, text=True,
        stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}) for rank in (0, 1)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


@pytest.mark.parametrize('given, in_config, expected', [('a', 'b', 'a'), (None, 'b', 'b'), ('a', None, 'a')])
def test_prepare__work_dir(given, in_config, expected, tmp_path):
    cfg = config(tmp_path, work_dir=in_config)
    prepare(cfg, 'none', given)
    assert cfg.work_dir == expected


def test_prepare__processes_on_cpu_talk_over_gloo(tmp_path, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = config(tmp_path)
    prepare(cfg, 'pytorch', None)
    assert groups == ['gloo']
    assert cfg.launcher == 'pytorch'
    assert cfg.model_wrapper_cfg == dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                                         find_unused_parameters=False)


def test_prepare__the_wrapper_of_the_config_is_kept_on_cpu(tmp_path, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = config(tmp_path, model_wrapper_cfg=dict(type='MMSeparateDistributedDataParallel', static_graph=True),
                 find_unused_parameters=True)
    prepare(cfg, 'pytorch', None)
    assert cfg.model_wrapper_cfg == dict(type='MMSeparateDistributedDataParallel', device_ids=None, static_graph=True,
                                         broadcast_buffers=False, find_unused_parameters=True)


@pytest.mark.parametrize('launcher, expected', [('mpi', '3'), ('pytorch', '0')])
def test_prepare__the_gpu_of_a_process_of_mpirun(launcher, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '3')
    monkeypatch.setenv('LOCAL_RANK', '0')
    prepare(config(tmp_path), launcher, None)
    # What mmengine gives DDP.
    assert os.environ['LOCAL_RANK'] == expected


@pytest.mark.parametrize('randomness, before, expected', [
    (None, None, None), (dict(seed=1), None, None), (dict(deterministic=True), None, ':4096:8'),
    (dict(deterministic=True), ':16:8', ':16:8')])
def test_prepare__what_deterministic_matrix_products_need(randomness, before, expected, tmp_path, monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', before or 'x')
    if before is None:
        monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG')
    prepare(config(tmp_path, randomness=randomness), 'none', None)
    assert os.environ.get('CUBLAS_WORKSPACE_CONFIG') == expected


SCHEDULE = [dict(type='LinearLR', by_epoch=True, begin=0, end=15),
            dict(type='CosineAnnealingLR', by_epoch=True, begin=15)]


@pytest.mark.parametrize('epochs', [3, 15])
def test_prepare__warm_up_longer_than_training(epochs, tmp_path, groups):
    cfg = config(tmp_path, param_scheduler=SCHEDULE, train_cfg=dict(max_epochs=epochs))
    message = f'CosineAnnealingLR of param_scheduler begins at epoch 15, but training ends after {epochs}: .*'
    with pytest.raises(ValueError, match=message + 'param_scheduler=None'):
        prepare(cfg, 'none', None)
    # The cures that it names.
    prepare(config(tmp_path, param_scheduler=None, train_cfg=cfg.train_cfg.to_dict()), 'none', None)
    cfg.merge_from_dict({'param_scheduler.0.end': 1, 'param_scheduler.1.begin': 1})
    prepare(cfg, 'none', None)


def test_prepare__warm_up_longer_than_training__in_iterations(tmp_path, groups):
    schedule = [dict(type='LinearLR', by_epoch=False, begin=0, end=1500),
                dict(type='PolyLR', by_epoch=False, begin=1500)]
    message = 'PolyLR of param_scheduler begins at iteration 1500, but training ends after 1500: shorten the warm-up'
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path, param_scheduler=schedule, train_cfg=dict(max_iters=1500)), 'none', None)
    prepare(config(tmp_path, param_scheduler=schedule, train_cfg=dict(max_iters=1501)), 'none', None)


@pytest.mark.parametrize('scheduler, train_cfg', [
    (SCHEDULE, dict(max_epochs=16)), (SCHEDULE, dict(max_iters=5)), (SCHEDULE[1], dict(max_epochs=1)), (None, None),
    ([dict(type='LinearLR', by_epoch=False, begin=100, end=200)], dict(max_epochs=1))
])
def test_prepare__other_schedules_are_left_alone(scheduler, train_cfg, tmp_path, groups):
    cfg = config(tmp_path, param_scheduler=scheduler, train_cfg=train_cfg)
    prepare(cfg, 'none', None)
    assert (cfg.param_scheduler, cfg.train_cfg) == (scheduler, train_cfg)


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_prepare__gpus_are_left_to_mmengine(launcher, tmp_path, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = config(tmp_path)
    prepare(cfg, launcher, None)
    assert cfg.launcher == launcher
    assert groups == []
    assert 'model_wrapper_cfg' not in cfg


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_prepare__other_launchers_need_gpus(launcher, tmp_path, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match=f"launcher '{launcher}' needs GPUs, and none is visible: use tools/"):
        prepare(config(tmp_path), launcher, None)
    assert groups == []


@pytest.mark.parametrize('prefix', ['backbone.', 'module.backbone.'])
def test_fitting_checkpoint__of_the_model(prefix, runner):
    checkpoint = dict(state_dict={
        f'{prefix}weight': torch.zeros(1, 1), f'{prefix}bias': torch.zeros(1), 'head.a': torch.zeros(1)})
    runner.model['losses'] = torch.nn.Linear(1, 1)
    FittingCheckpoint().after_load_checkpoint(runner, checkpoint)
    FittingCheckpoint().after_load_checkpoint(runner, checkpoint['state_dict'])


def test_fitting_checkpoint__of_another_model(runner):
    message = (r'no tensor of the checkpoint \(weight\) is one of ModuleDict \(backbone.weight, backbone.bias\): give '
               'the checkpoint of')
    with pytest.raises(ValueError, match=message):
        FittingCheckpoint().after_load_checkpoint(runner, dict(state_dict=dict(weight=torch.zeros(1))))


@pytest.mark.parametrize('tensors, message', [
    (dict(weight=(1, 1)), r'ModuleDict: it lacks 1 tensors \(backbone.bias\), and 0 have another shape \(none\)'),
    (dict(weight=(2, 1), bias=(1, )), r'lacks 0 tensors \(none\), and 1 have another shape \(backbone.weight: \(2, 1\) '
                                      r'there, \(1, 1\) here\)\. Give the config the arch'),
    (dict(weight=(1, 1), bias=(1, ), pos_embed=(1, 9, 4)), r'1 have another shape \(backbone.pos_embed'),
])
def test_fitting_checkpoint__of_another_architecture(tensors, message, runner):
    if 'pos_embed' in tensors:
        runner.model['backbone'].pos_embed = torch.nn.Parameter(torch.zeros(1, 5, 8))
    checkpoint = dict(state_dict={f'backbone.{name}': torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(ValueError, match=message):
        FittingCheckpoint().after_load_checkpoint(runner, checkpoint)


def test_fitting_checkpoint__of_another_image_size(runner):
    runner.model['backbone'].pos_embed = torch.nn.Parameter(torch.zeros(1, 5, 4))
    shapes = dict(weight=(1, 1), bias=(1, ), pos_embed=(1, 9, 4))
    checkpoint = dict(state_dict={f'backbone.{name}': torch.zeros(shape) for name, shape in shapes.items()})
    FittingCheckpoint().after_load_checkpoint(runner, checkpoint)
