import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ..checkpoints import write_atomically

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@HOOKS.register_module()
class StopOnSignal(Hook):
    """On ``SIGTERM`` or ``SIGINT`` (Ctrl-C): finish the iteration, write one checkpoint, leave.

    For clusters that take machines back. A signal only sets a flag; at the end of an iteration all processes agree
    whether one of them has it, the main process writes ``interrupted.pth``, and all exit with 128 + the signal's
    number. Where gradients of several steps are added up, they first come to the update. A validation in progress comes
    to its end. ``--resume`` goes on at the next iteration. A second Ctrl-C does not wait: it ends the process at once,
    without that checkpoint. Before the first iteration and after the last one signals end the process as usual.

    Args:
        filename: of the checkpoint, in the work folder.

    Raises:
        SystemExit: with the code.
        KeyboardInterrupt: on a second Ctrl-C.
    """

    # After all hooks that have to do with the iteration.
    priority = 'LOWEST'

    def __init__(self, filename: str = 'interrupted.pth'):
        self.filename = filename
        self._signal = 0
        self._before: dict = {}

    def before_train(self, runner: Runner) -> None:
        self._signal = 0
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning('StopOnSignal: signals can only be heeded in the main thread, so they end this run '
                                  'at once, without a checkpoint.')
            return
        # None where it was not Python that handled the signal.
        self._before = {number: signal.signal(number, self._note) or signal.SIG_DFL for number in _SIGNALS}

    def _note(self, number: int, frame) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        found = torch.tensor(int(self._signal))
        all_reduce(found, 'max')
        wrapper = runner.optim_wrapper
        if not found or getattr(wrapper, '_inner_count', 0) % getattr(wrapper, '_accumulative_counts', 1):
            return
        name = signal.Signals(int(found)).name
        path = Path(runner.work_dir, self.filename)
        try:
            runner.save_checkpoint(runner.work_dir, self.filename, by_epoch=False,
                                   meta=dict(epoch=runner.epoch, iter=runner.iter + 1))
            if is_main_process():
                write_atomically(Path(runner.work_dir, 'last_checkpoint'), str(path).encode())
            runner.logger.warning(f'{name}: {path} is written after iteration {runner.iter + 1}; go on with --resume')
        except OSError as error:
            runner.logger.error(f'{name}: no checkpoint could be written ({error}); --resume goes on from the last one')
        # None may leave first: a launcher would kill the one that writes.
        barrier()
        self.restore()
        raise SystemExit(128 + int(found))

    def after_train(self, runner: Runner) -> None:
        self.restore()

    def restore(self) -> None:
        """Signals do again what they did before training."""
        while self._before:
            signal.signal(*self._before.popitem())


def hold_sigterm(start: Callable[[], object]) -> object:
    """``start`` workers that get no ``SIGTERM`` before they have come to :func:`ignore_signals`, but then.

    Else the handler that they inherit would take the one by which they are ended, and whoever ends them would wait.
    """
    if not hasattr(signal, 'pthread_sigmask'):
        return start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(then: Callable | None, worker: int) -> None:
    """In a worker of a data loader: signals that are sent to all processes at once are the main process's matter.

    Its ``SIGTERM`` alone ends the worker, as torch and multiprocessing expect when they shut one down.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process().pid
        threading.Thread(target=_wait_for_parent, args=(parent, ), daemon=True).start()
    if then is not None:
        then(worker)


def _wait_for_parent(parent: int) -> None:
    # Only a signal that is waited for tells who sent it.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
