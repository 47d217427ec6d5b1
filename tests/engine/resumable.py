"""A tiny run in processes of its own, which can be killed: shared by the tests of resuming."""
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from torch.utils.data import Dataset, Subset

import mmhdistill.engine  # noqa: F401
from mmhdistill.engine.launch import leave
from mmhdistill.engine.runner import ResumableRunner
from tests.helpers import tiny_distiller, tiny_student

IMAGES, BATCH, EPOCHS = 14, 2, 3
ITERS = IMAGES // BATCH * EPOCHS  # of one process


class Images(Dataset):
    """Images with an augmentation that draws from all three generators."""

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(index))
        noise = torch.rand(3, 1, 1) * 20 + np.random.rand() * 10 + random.random() * 10
        return dict(inputs=(image + noise).clamp(0, 255))


def config(folder: Path, workers: int = 0, amp: bool = False, iters: bool = False, hooks: tuple = (), **kwargs) -> dict:
    """Arguments of a Runner: three epochs of seven batches of two images (of one process)."""
    training = (dict(type='IterBasedTrainLoop', max_iters=ITERS) if iters else
                dict(type='EpochBasedTrainLoop', max_epochs=EPOCHS))
    student = tiny_student(drop_path_rate=0.3, drop_rate=0.1)
    return {
        **dict(
            model=tiny_distiller(backbone=student), work_dir=str(folder),
            train_dataloader=dict(
                batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0, dataset=Images(),
                sampler=dict(type='InfiniteSampler' if iters else 'DefaultSampler', shuffle=True)),
            train_cfg=training,
            optim_wrapper=dict(
                type='mmhdistill.BFloat16OptimWrapper' if amp else 'OptimWrapper',
                optimizer=dict(type='AdamW', lr=1e-3), clip_grad=dict(max_norm=1.0)),
            param_scheduler=dict(type='CosineAnnealingLR', by_epoch=False, T_max=ITERS),
            custom_hooks=[dict(type='EMAHook', momentum=0.1),
                          dict(type='mmhdistill.RedundantTokenMasker', schedule='linear'), *hooks],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False, max_keep_ckpts=2)),
            default_scope='mmpretrain', log_level='WARNING', resume=True, randomness=dict(seed=3, diff_rank_seed=True)),
        **kwargs
    }


class Score(BaseMetric):
    """The iterations done, which :class:`Scored` tells."""

    def process(self, data_batch, data_samples):
        self.results += [0] * len(data_samples)

    def compute_metrics(self, results):
        return dict(score=Scored.iterations)


class Scored(Hook):
    """Writes down after how many iterations there was a validation."""

    iterations = 0.0

    def __init__(self, folder: Path):
        self.folder = folder

    def before_val_epoch(self, runner):
        Scored.iterations = float(runner.iter)
        with (self.folder / 'validated.txt').open('a') as file:
            file.write(f'{runner.iter}\n')


def validated(folder: Path, *hooks: Hook, iters: bool = False) -> dict:
    """For :func:`run`: a validation and a checkpoint every seven iterations, each the best one so far; after the first
    one each halves the learning rate."""
    interval = 7 if iters else 1
    training = (dict(type='IterBasedTrainLoop', max_iters=ITERS, val_interval=7) if iters else
                dict(type='EpochBasedTrainLoop', max_epochs=EPOCHS))
    return dict(
        iters=iters, hooks=(*hooks, Scored(folder)), train_cfg=training, val_cfg=dict(), val_evaluator=[Score()],
        val_dataloader=dict(batch_size=2, num_workers=0, dataset=Subset(Images(), range(4)),
                            sampler=dict(type='DefaultSampler', shuffle=False)),
        param_scheduler=dict(type='ReduceOnPlateauLR', monitor='score', rule='greater', factor=0.5, patience=0,
                             threshold=1e6, threshold_rule='abs', end=99),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=interval, by_epoch=not iters,
                                           save_best='score', rule='greater')))


def run(folder: Path, world_size: int = 1, before=None, kill_after: float | None = None, start: str = 'fork',
        **kwargs) -> list[int]:
    """Train in ``world_size`` processes that talk over gloo; returns their exit codes, -9 for SIGKILL.

    ``before(rank)`` is called in each process first. After ``kill_after`` seconds all get SIGKILL. ``start`` is how
    Python makes the processes: a forked one cannot use a GPU that this process knows of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as room:
        processes = [multiprocessing.get_context(start).Process(
            target=_work, args=(rank, world_size, f'{room}/rendezvous', folder, before, kwargs))
            for rank in range(world_size)]
        for process in processes:
            process.start()
        end = time.monotonic() + (300 if kill_after is None else kill_after)
        # Not join(): it waits for a pipe that workers of a killed process hold open for 5 s more.
        while time.monotonic() < end and any(process.is_alive() for process in processes):
            time.sleep(0.01)
        stuck = [process for process in processes if process.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        assert not stuck or kill_after is not None, 'the run did not end'
    return [process.exitcode for process in processes]


def _work(rank: int, world_size: int, rendezvous: str, folder: Path, before, kwargs: dict) -> None:
    out = (folder / f'output-{rank}.txt').open('a')
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    sys.stdout = sys.stderr = out
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ['LOCAL_RANK'] = str(rank)
    if before is not None:
        before(rank)
    if world_size > 1:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=world_size)
        kwargs = dict(kwargs, launcher='pytorch', cfg=dict(model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)))
    settings = config(folder, **kwargs)
    ResumableRunner(**settings, experiment_name=f'{folder.name}-{os.getpid()}').train()
    leave()


def output(folder: Path, rank: int = 0) -> str:
    return (folder / f'output-{rank}.txt').read_text()


def last(folder: Path) -> dict:
    """Content of the last checkpoint."""
    return torch.load((folder / 'last_checkpoint').read_text(), weights_only=True)


def assert_same_end(folder: Path, other: Path) -> None:
    """Both runs ended with the same bits: weights, averaged weights, optimizer and schedule; nothing is left over."""
    ends = [last(path) for path in (folder, other)]
    assert [end['meta']['iter'] for end in ends] == [ends[0]['meta']['iter']] * 2
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        one, two = (dict(_leaves(end[key])) for end in ends)
        assert list(one) == list(two) and len(one) > 1
        assert [name for name, x in one.items() if not _equal(x, two[name])] == []
    assert [path.name for path in folder.rglob('*.partial')] == []


def _leaves(value, name=''):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f'{name}.{key}')
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _leaves(part, f'{name}.{i}')
    else:
        yield name, value


def _equal(one, two) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


class Act(Hook):
    """Does something to its own process at a stage of an iteration (from 0), or before the validation after so many."""

    priority = 'VERY_HIGH'

    def __init__(self, act, iteration: int, stage: str = 'after_train_iter', rank: int = 0):
        self.act, self.iteration, self.stage, self.rank = act, iteration, stage, rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._at(runner, 'before_train_iter')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._at(runner, 'after_train_iter')

    def before_val_epoch(self, runner):
        self._at(runner, 'before_val_epoch')

    def _at(self, runner, stage):
        if (runner.iter, stage, runner.rank) == (self.iteration, self.stage, self.rank):
            self.act()


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)
