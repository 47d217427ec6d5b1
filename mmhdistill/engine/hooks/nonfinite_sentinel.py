import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from ...registry import HOOKS
from ..checkpoints import remove_checkpoint, write_atomically
from ..replay import forward, nonfinite_gradients, plain_model


class _Part(NamedTuple):
    """One of the batches whose gradients an update adds up."""
    number: int  # in its pass over the data
    iteration: int
    data: object
    keep_rate: float | None
    finite: Tensor


@HOOKS.register_module()
class NonFiniteSentinel(Hook):
    """Sees a loss or gradient that is not finite before the optimizer does.

    Such a step is skipped, by all processes, with the running statistics put back that its forward has changed; and it
    is recorded for ``tools/replay.py`` in the folder ``nonfinite`` of the work folder: each process its samples,
    counters of random numbers, losses, gradients that are not finite, and ranges of tokens and attention scores layer
    by layer; and, of the first of steps in a row, a checkpoint of the state before it (the last one is kept). Of an
    update that adds up several batches, the first that is not finite in this process, else the last, is recorded. A
    checkpoint whose weights or optimizer state are not finite is not written; averages of finite weights are finite.

    With float16 and loss scaling the scaler skips steps with infinite gradients, as it has to; then the loss alone is
    looked at. For one optimizer, and with :class:`ResumableRunner`.

    Args:
        max_skips: steps in a row that may be skipped [choice].

    Raises:
        FloatingPointError: one more step in a row is not finite, or so is what a checkpoint would hold.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_skips: int = 3):
        if max_skips < 0:
            raise ValueError(f'max_skips={max_skips}: give how many steps in a row may be skipped, 0 or more.')
        self.max_skips = max_skips
        self.skipped = 0

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        if not _is_single(wrapper):
            runner.logger.warning('NonFiniteSentinel watches a single optimizer: it does nothing here')
            return
        self._step, self._backward = wrapper.step, wrapper.backward
        self._begin_update(runner)

        def backward(loss: Tensor, **kwargs) -> None:
            self._backward(loss, **kwargs)
            # Looked at once all is done, so that the GPU is not waited for twice.
            finite = loss.detach().isfinite().all() & self._finite_gradients(runner)
            self._parts.append(_Part(*self._batch, _keep_rate(plain_model(runner)), finite))

        def step(**kwargs) -> None:
            if self._agreed_finite(runner):
                self.skipped = 0
                self._step(**kwargs)
            else:
                self._skip(runner)

        wrapper.backward, wrapper.step = backward, step

    def after_train(self, runner: Runner) -> None:
        for name in ('step', 'backward'):
            vars(runner.optim_wrapper).pop(name, None)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        wrapper = runner.optim_wrapper
        if _is_single(wrapper):
            if wrapper._inner_count % wrapper._accumulative_counts == 0:
                self._begin_update(runner)
            self._batch = batch_idx, runner.iter, data_batch

    def _begin_update(self, runner: Runner) -> None:
        self._parts: list[_Part] = []
        self._buffers = _clones(plain_model(runner).named_buffers())

    def _finite_gradients(self, runner: Runner) -> Tensor:
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        gradients = [p.grad for p in runner.model.parameters() if p.grad is not None and p.grad.numel()]
        if not gradients or scaler is not None and scaler.is_enabled() and scaler.get_scale() != 1:
            return torch.tensor(True)
        # One number per tensor: a sum of absolute values could overflow, a greatest one cannot.
        norms = torch._foreach_norm(gradients, float('inf'))
        return torch.stack([x.float() for x in norms]).isfinite().all()

    def _agreed_finite(self, runner: Runner) -> bool:
        finite = [part.finite for part in self._parts] or [self._finite_gradients(runner)]
        broken = (~torch.stack(finite).all()).to(torch.int64)
        all_reduce(broken, 'max')
        return not broken

    def _skip(self, runner: Runner) -> None:
        self.skipped += 1
        _put_back(plain_model(runner).named_buffers(), self._buffers)
        try:
            record = self._record(runner, Path(runner.work_dir, 'nonfinite'))
        except Exception as error:  # a full disk, say, is no reason to end a run
            if isinstance(error, torch.cuda.OutOfMemoryError) and _talks(runner):
                raise  # else its norms would put their statistics into those of another step of the others
            record = f'no record could be written ({type(error).__name__}: {error})'
        what = (f'iteration {runner.iter + 1}: loss or gradients are not finite, in this process or another one; '
                f'{record}')
        if self.skipped > self.max_skips:
            raise FloatingPointError(
                f'{what}. {self.skipped} steps in a row: training ends. Look at the layers with tools/replay.py CONFIG '
                'RECORD; a lower learning rate, clipped gradients (clip_grad), bfloat16 or float32 in place of float16 '
                'and other teachers are the usual cures. --resume goes on from the last checkpoint, which is finite.')
        runner.logger.error(f'{what}. The step is skipped ({self.skipped} in a row, at most {self.max_skips}).')

    def _record(self, runner: Runner, folder: Path) -> str:
        model, name = plain_model(runner), f'iter_{runner.iter}'
        gradients = nonfinite_gradients(model)
        part = next((part for part in self._parts if not part.finite), self._parts[-1])
        # First: layers that talk to other processes need all of them here, and a disk may be full for one alone.
        losses, layers = _forward_again(runner, part)
        folder.mkdir(parents=True, exist_ok=True)
        if self.skipped == 1 and is_main_process():
            old = list(folder.glob('*.pth'))
            runner.save_checkpoint(str(folder), f'{name}.pth', meta=dict(
                epoch=runner.epoch, iter=runner.iter, batches_done=self._batch[0]))
            for path in old:
                if path.stem != name:
                    remove_checkpoint(path)
        issued = getattr(runner.train_dataloader.batch_sampler, 'issued', None)
        file = folder / f'{name}_rank_{runner.rank}.json'
        record = dict(
            iteration=runner.iter, epoch=runner.epoch, batch=part.number, batch_iteration=part.iteration,
            rank=runner.rank, processes=runner.world_size, seed=runner.base_seed,
            samples=issued and issued(part.number),
            keep_rate=part.keep_rate, checkpoint=f'{name}.pth' if self.skipped == 1 else None,
            losses={key: float(x) for key, x in losses.items()}, gradients=gradients, layers=layers)
        # Samplers that count with numpy give its integers.
        write_atomically(file, (json.dumps(record, indent=1, default=int) + '\n').encode())
        return f'its record is {file}'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        weights = checkpoint['state_dict']
        # Some models, of adapters for example, save a part of theirs.
        learnt = {name: weights[name] for name, _ in plain_model(runner).named_parameters() if name in weights}
        broken = [*_broken(learnt), *_broken(checkpoint.get('optimizer', {}).get('state', {}), 'optimizer')]
        # Others may be infinite on purpose, or no tensors, as what a module keeps by get_extra_state().
        broken += [name for name, x in weights.items()
                   if name not in learnt and isinstance(x, Tensor) and x.isnan().any()]
        if broken:
            raise FloatingPointError(f'{len(broken)} tensors are not finite ({", ".join(broken[:3])}): the checkpoint '
                                     'is not written, and training ends. --resume goes on from the last one.')


def _is_single(wrapper: OptimWrapper) -> bool:
    # mmengine's of several is a subclass of its of one.
    return isinstance(wrapper, OptimWrapper) and not isinstance(wrapper, OptimWrapperDict)


@torch.no_grad()
def _forward_again(runner: Runner, part: _Part) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Losses and layers of a batch; the model stays as it is."""
    model = plain_model(runner)
    rate = _keep_rate(model)
    before = _clones((name, x) for name, x in _tensors(model) if not x.requires_grad)
    try:
        if part.keep_rate is not None:
            model.masker.keep_rate = part.keep_rate
        return forward(model, runner.optim_wrapper, part.data, runner.base_seed, part.iteration, runner.rank)
    finally:
        if rate is not None:
            model.masker.keep_rate = rate
        _put_back(_tensors(model), before)


def _talks(runner: Runner) -> bool:
    """Whether a forward exchanges something with other processes."""
    return runner.world_size > 1 and any(isinstance(x, nn.SyncBatchNorm) for x in plain_model(runner).modules())


def _keep_rate(model: nn.Module) -> float | None:
    return getattr(getattr(model, 'masker', None), 'keep_rate', None)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _clones(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors}


@torch.no_grad()
def _put_back(tensors: Iterable[tuple[str, Tensor]], before: dict[str, Tensor]) -> None:
    for name, x in tensors:
        # What is kept for an image size is made anew for another one.
        if name in before and x.shape == before[name].shape:
            x.copy_(before[name])


def _broken(value, name: str = '') -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _broken(part, f'{name}.{key}' if name else str(key))
    elif isinstance(value, Tensor) and not value.isfinite().all():
        yield name
