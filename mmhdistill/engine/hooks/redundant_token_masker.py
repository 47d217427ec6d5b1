from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ...functional import check_keep_rate, ramp
from ...models import ProgressiveTokenMasker
from ...registry import HOOKS


@HOOKS.register_module()
class RedundantTokenMasker(Hook):
    """Moves the masker's keep rate over training, and logs it with the number of tokens kept.

    The rate is a function of the iteration alone, so a resumed run continues where it was. Logs ``train/keep_rate`` and
    ``train/kept_tokens`` (patches left after the last stage).

    Args:
        keep_rate: r to arrive at, per stage; the masker's own if None.
        start: rate that a ramp starts from.
        schedule: ``constant``, ``linear`` or ``cosine``.
        begin, end: where the ramp starts and is over, in epochs or iterations; ``end`` None is the end of training.
        by_epoch: unit of ``begin`` and ``end``.
    """

    priority = 'NORMAL'

    def __init__(self, keep_rate: float | None = None, start: float = 1.0, schedule: str = 'constant',
                 begin: float = 0, end: float | None = None, by_epoch: bool = True):
        for rate in (start, keep_rate):
            if rate is not None:
                check_keep_rate(rate)
        ramp(0.0, 1.0, 1.0, schedule)
        if end is not None and end <= begin:
            raise ValueError(f'the ramp must end after it begins, got begin={begin} and end={end}.')
        self.keep_rate = keep_rate
        self.start = start
        self.schedule = schedule
        self.begin = begin
        self.end = end
        self.by_epoch = by_epoch

    def before_train(self, runner: Runner) -> None:
        self._masker = masker_of(runner.model.module if is_model_wrapper(runner.model) else runner.model)
        if self.keep_rate is None:
            self.keep_rate = self._masker.keep_rate
        # Epochs are counted in iterations, so that the rate moves within an epoch too.
        scale = len(runner.train_dataloader) if self.by_epoch else 1
        self._begin = self.begin * scale
        self._end = runner.max_iters if self.end is None else self.end * scale

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        progress = (runner.iter - self._begin) / max(self._end - self._begin, 1)
        self._masker.keep_rate = ramp(progress, self.start, self.keep_rate, self.schedule)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        runner.message_hub.update_scalar('train/keep_rate', self._masker.keep_rate)
        runner.message_hub.update_scalar('train/kept_tokens', self._masker.last_counts[-1])


def masker_of(model: nn.Module) -> ProgressiveTokenMasker:
    """The masker whose keep rate the hook moves."""
    masker = getattr(model, 'masker', None)
    if masker is None:
        raise ValueError('the RedundantTokenMasker hook moves the keep rate of model.masker, but '
                         f'{type(model).__name__} has no masker: give the model one, or remove the hook.')
    return masker
