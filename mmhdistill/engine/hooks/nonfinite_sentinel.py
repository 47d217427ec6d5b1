import json
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor

from ...registry import HOOKS
from ..checkpoints import remove_checkpoint, write_atomically
from ..replay import forward, nonfinite_gradients, plain_model


@HOOKS.register_module()
class NonFiniteSentinel(Hook):
    """Sees a loss or gradient that is not finite before the optimizer does.

    Such a step is skipped, by all processes, and recorded for ``tools/replay.py`` in the folder ``nonfinite`` of the
    work folder: each process its samples, counters of random numbers, losses, gradients that are not finite, and ranges
    of tokens and attention scores layer by layer; and, of the first of steps in a row, a checkpoint of the state before
    it (the last one is kept). A checkpoint whose weights, averages or optimizer state are not finite is not written.

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
        if not isinstance(wrapper, OptimWrapper):
            runner.logger.warning('NonFiniteSentinel watches a single optimizer: it does nothing here')
            return
        self._step, self._update_params = wrapper.step, wrapper.update_params
        self._finite = True

        def update_params(loss: Tensor, *args, **kwargs) -> None:
            # Looked at once all is done, so that the GPU is not waited for twice.
            self._finite = loss.detach().isfinite().all() & self._finite
            self._update_params(loss, *args, **kwargs)

        def step(**kwargs) -> None:
            if self._agreed_finite(runner):
                self.skipped = 0
                self._step(**kwargs)
            else:
                self._skip(runner)
            self._finite = True

        wrapper.update_params, wrapper.step = update_params, step

    def after_train(self, runner: Runner) -> None:
        for name in ('step', 'update_params'):
            vars(runner.optim_wrapper).pop(name, None)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._batch_idx, self._batch = batch_idx, data_batch

    def _agreed_finite(self, runner: Runner) -> bool:
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        finite = torch.as_tensor(self._finite)
        if scaler is None or not scaler.is_enabled() or scaler.get_scale() == 1:
            gradients = [p.grad for p in runner.model.parameters() if p.grad is not None]
            # One number per tensor: a sum of absolute values could overflow, a greatest one cannot.
            norms = torch._foreach_norm(gradients, float('inf'))
            finite = finite.to(norms[0].device) & torch.stack([x.float() for x in norms]).isfinite().all()
        broken = (~finite).to(torch.int64)
        all_reduce(broken, 'max')
        return not broken

    def _skip(self, runner: Runner) -> None:
        self.skipped += 1
        folder = Path(runner.work_dir, 'nonfinite')
        try:
            record = self._record(runner, folder)
        except OSError as error:
            record = f'no record could be written, {error}'
        what = (f'iteration {runner.iter + 1}: loss or gradients are not finite, in this process or another one; '
                f'{record}')
        if self.skipped > self.max_skips:
            raise FloatingPointError(
                f'{what}. {self.skipped} steps in a row: training ends. Look at the layers with tools/replay.py CONFIG '
                'RECORD; a lower learning rate, clipped gradients (clip_grad), bfloat16 or float32 in place of float16 '
                'and other teachers are the usual cures. --resume goes on from the last checkpoint, which is finite.')
        runner.logger.error(f'{what}. The step is skipped ({self.skipped} in a row, at most {self.max_skips}).')

    def _record(self, runner: Runner, folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        model, name = plain_model(runner), f'iter_{runner.iter}'
        gradients = nonfinite_gradients(model)
        if self.skipped == 1 and is_main_process():
            old = list(folder.glob('*.pth'))
            runner.save_checkpoint(str(folder), f'{name}.pth', meta=dict(
                epoch=runner.epoch, iter=runner.iter, batches_done=self._batch_idx))
            for path in old:
                if path.stem != name:
                    remove_checkpoint(path)
        with torch.no_grad():
            losses, layers = forward(model, runner.optim_wrapper, self._batch, runner.base_seed, runner.iter,
                                     runner.rank)
        samples = runner.train_dataloader.batch_sampler.issued(self._batch_idx)
        file = folder / f'{name}_rank_{runner.rank}.json'
        record = dict(
            iteration=runner.iter, epoch=runner.epoch, batch=self._batch_idx, rank=runner.rank,
            processes=runner.world_size, seed=runner.base_seed,
            samples=[(int(index), index.counters) for index in samples],
            keep_rate=getattr(getattr(model, 'masker', None), 'keep_rate', None),
            checkpoint=f'{name}.pth' if self.skipped == 1 else None,
            losses={key: float(x) for key, x in losses.items()}, gradients=gradients, layers=layers)
        write_atomically(file, (json.dumps(record, indent=1) + '\n').encode())
        return f'its record is {file}'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        weights = checkpoint['state_dict']
        learnt = {name: weights[name] for name, _ in plain_model(runner).named_parameters()}
        broken = [*_broken(learnt), *_broken(checkpoint.get('optimizer', {}).get('state', {}), 'optimizer')]
        # Others may be infinite on purpose.
        broken += [name for name, x in weights.items() if name not in learnt and x.isnan().any()]
        if broken:
            raise FloatingPointError(f'{len(broken)} tensors are not finite ({", ".join(broken[:3])}): the checkpoint '
                                     'is not written, and training ends. --resume goes on from the last one.')


def _broken(value, name: str = '') -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _broken(part, f'{name}.{key}' if name else str(key))
    elif isinstance(value, Tensor) and not value.isfinite().all():
        yield name
