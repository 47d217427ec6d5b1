from copy import copy
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ...registry import HOOKS
from ..checkpoints import remove_checkpoint, remove_leftovers, write_atomically


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` that never leaves less on disk than before.

    Outdated checkpoints are removed when the new one is written, ``last_checkpoint`` changes at once, what a killed
    process has left unfinished is removed when training starts. A checkpoint that cannot be written (disk full) is told
    in the log; what is there stays, training goes on, and the next interval tries again. So the disk needs room for
    ``max_keep_ckpts`` + 1.
    """

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        # Of the run that is resumed, whose folder may have moved, or be copied and go on itself.
        hub = runner.message_hub
        for name in [name for name in hub.runtime_info if name.startswith(('last_ckpt', 'best_ckpt'))]:
            here = self.file_backend.join_path(self.out_dir, Path(hub.get_info(name) or '').name)
            hub.update_info(name, here if self.file_backend.isfile(here) else None)
            if name == 'last_ckpt':
                self.last_ckpt = hub.get_info(name)
            elif name == 'best_ckpt' and hasattr(self, 'best_ckpt_path'):
                self.best_ckpt_path = hub.get_info(name)
            elif hasattr(self, 'best_ckpt_path_dict'):
                self.best_ckpt_path_dict[name.removeprefix('best_ckpt_')] = hub.get_info(name)
        if not is_main_process():
            return
        for folder in {str(self.out_dir), runner.work_dir, str(Path(runner.work_dir, 'nonfinite'))}:
            if left := remove_leftovers(Path(folder)):
                names = ', '.join(path.name for path in left)
                runner.logger.info(f'removed from {folder} what a killed run had not finished: {names}')
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if counts > 1 and (len(runner.train_dataloader) if self.by_epoch else self.interval) % counts:
            runner.logger.warning(
                f'checkpoints lie between updates, which add up the gradients of {counts} iterations: a resumed run '
                'lacks those since the last update. For an exact resume set default_hooks.checkpoint by_epoch=False '
                f'and an interval that {counts} divides.')

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        before, outdated = self.last_ckpt, []
        kept = list(getattr(self, 'keep_ckpt_ids', ()))
        if self.max_keep_ckpts > 0 and step not in kept[-1:]:
            outdated = (kept + [step])[:-self.max_keep_ckpts]
            self.keep_ckpt_ids.append(step)
            # With the outdated: a run that is killed before they are removed does so when it goes on.
            runner.message_hub.update_info('keep_ckpt_ids', kept + [step])
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        try:
            runner.save_checkpoint(
                self.out_dir, name, self.file_client_args, save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
                backend_args=self.backend_args, **self.args)
            if is_main_process():
                write_atomically(Path(runner.work_dir, 'last_checkpoint'), self.last_ckpt.encode())
        except OSError as error:
            self.last_ckpt = before
            runner.message_hub.update_info('last_ckpt', before)
            if self.max_keep_ckpts > 0:
                self.keep_ckpt_ids.clear()
                self.keep_ckpt_ids.extend(kept)
                runner.message_hub.update_info('keep_ckpt_ids', kept)
            _warn_of(runner, name, error)
            return
        if is_main_process():
            for old in outdated:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend, later = self.file_backend, _LaterRemoval(self.file_backend)
        hub, names = runner.message_hub, ('best_score', 'best_ckpt')
        known = {name: x for name, x in hub.runtime_info.items() if name.startswith(names)}
        paths = {name: copy(x) for name, x in vars(self).items() if name.startswith(names)}
        self.file_backend = later
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            _warn_of(runner, 'the best one', error)
            later.doomed = []
            # The best one is still the one on disk.
            for name in [name for name in hub.runtime_info if name.startswith(names)]:
                hub.pop_info(name)
            hub.update_info_dict(known)
            vars(self).update(paths)
        finally:
            self.file_backend = backend
        best = {getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()}
        for path in later.doomed:
            if path not in best:
                self._remove(path)

    def _remove(self, path: str) -> None:
        if Path(path).is_file():
            remove_checkpoint(Path(path))
        elif self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # of deepspeed
            self.file_backend.rmtree(path)


class _LaterRemoval:
    """A file backend that notes what it is asked to remove."""

    def __init__(self, backend):
        self._backend = backend
        self.doomed: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.doomed.append(path)

    rmtree = remove


def _warn_of(runner: Runner, name: str, error: OSError) -> None:
    runner.logger.warning(f'checkpoint {name} could not be written ({error}): those on disk are as they were, training '
                          'goes on and tries again at the next interval. Free some space.')
