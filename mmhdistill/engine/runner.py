"""A Runner whose runs can be killed, moved and resumed."""
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import all_reduce, broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, LOOPS, Registry
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..registry import RUNNERS
from .checkpoints import AtomicBackend, find_checkpoint, verify
from .hooks.stop_on_signal import StopOnSignal, hold_sigterm, ignore_signals
from .loops import SeekableEpochLoop, SeekableIterLoop

_LOOPS = {EpochBasedTrainLoop: SeekableEpochLoop, IterBasedTrainLoop: SeekableIterLoop}
# Hooks that are there without being named, and whose options may be set without their type.
DEFAULT_HOOKS = dict(
    checkpoint=dict(type='mmhdistill.WholeCheckpointHook', interval=1),
    manifest=dict(type='mmhdistill.RunManifest'),
    stop=dict(type='mmhdistill.StopOnSignal'),
    sentinel=dict(type='mmhdistill.NonFiniteSentinel'))
# What gloo says of it, after the name of its source file.
_LOST = ('closed by peer', 'reset by peer', 'timed out waiting', 'connection refused')


@RUNNERS.register_module()
class ResumableRunner(Runner):
    """mmengine's ``Runner`` with exact resume: a run that is killed at any time and resumed is the run that was not.

    Its train loops are :class:`SeekableEpochLoop` and :class:`SeekableIterLoop` where a config names mmengine's (other
    loops are left as they are, with a warning), its ``CheckpointHook`` is :class:`WholeCheckpointHook`, and its default
    hooks have besides ``manifest`` (:class:`RunManifest`), ``stop`` (:class:`StopOnSignal`) and ``sentinel``
    (:class:`NonFiniteSentinel`); None leaves one out. Checkpoints on local disks are written atomically, with a digest,
    which is verified when they are read. ``resume=True`` without ``load_from`` takes the newest checkpoint of the work
    folder that is whole.

    Used by configs through ``runner_type='mmhdistill.ResumableRunner'``.
    """

    @property
    def base_seed(self) -> int:
        """The seed of the run, the same in all processes."""
        return self.seed - (self.rank if self._randomness_cfg.get('diff_rank_seed') else 0)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        hooks = {**DEFAULT_HOOKS, **(hooks or {})}
        for name, default in DEFAULT_HOOKS.items():
            hook = hooks[name]
            if isinstance(hook, dict) and ('type' not in hook or _class_of(HOOKS, hook['type']) is CheckpointHook):
                hooks[name] = {**hook, 'type': default['type']}
        # mmengine knows how to leave out its own.
        super().register_default_hooks({
            name: hook for name, hook in hooks.items()
            if hook is not None or name not in ('manifest', 'stop', 'sentinel')})

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        if isinstance(loop, dict) and not {'type', 'by_epoch'} <= set(loop):
            named = IterBasedTrainLoop if loop.get('by_epoch') is False else EpochBasedTrainLoop
            seekable = _LOOPS.get(_class_of(LOOPS, loop.get('type', named)))
            if seekable:
                options = {key: value for key, value in loop.items() if key != 'by_epoch'}
                return LOOPS.build(dict(options, type=seekable), default_args=dict(
                    runner=self, dataloader=self._train_dataloader))
        built = super().build_train_loop(loop)
        if built is not loop and not isinstance(built, SeekableEpochLoop | SeekableIterLoop):
            self.logger.warning(f'{type(built).__name__} is no train loop of mmengine or mmhdistill: it resumes as it '
                                'does by itself, its steps and samples are not seeded, and no record of a step that is '
                                'not finite can be replayed')
        return built

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, seed: int | None = None,
                         diff_rank_seed: bool = False) -> DataLoader:
        """mmengine's, with workers that leave signals to the main process."""
        loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if loader is not dataloader:
            loader.worker_init_fn = partial(ignore_signals, loader.worker_init_fn)
            loader._get_iterator = partial(hold_sigterm, loader._get_iterator)
        return loader

    def train(self) -> nn.Module:
        try:
            return super().train()
        except RuntimeError as error:
            said = str(error).lower()
            if self.world_size > 1 and (isinstance(error, torch.distributed.DistError)
                                        or 'gloo' in said and any(text in said for text in _LOST)):
                raise RuntimeError(f'process {self.rank} of {self.world_size} has lost another one, which ended or '
                                   'cannot be reached: the log of that process, or the machine it ran on, tells why. '
                                   'This one ends too; start all of them again with --resume.') from error
            raise
        finally:
            for hook in self.hooks:
                if isinstance(hook, StopOnSignal):
                    hook.restore()

    def load_or_resume(self) -> None:
        if self._has_loaded:
            return
        if not self._resume or self._load_from is not None:
            if self._load_from is not None:
                self._check_seen_by_all(self._load_from)
            super().load_or_resume()
            return
        found = self._find_checkpoint()
        if found is None:
            self.logger.warning(f'no checkpoint to resume from in {self.work_dir}: training starts from the begin')
        else:
            self._check_seen_by_all(found)
            self.resume(found)

    def _find_checkpoint(self) -> str | None:
        """By the main process, so that no two processes go on from different ones, or one alone raises."""
        found: list[str | None] = [None, None]
        if is_main_process():
            try:
                found[0] = find_checkpoint(Path(self.work_dir))
            except (OSError, ValueError) as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def _check_seen_by_all(self, filename: str) -> None:
        """Else one process raises, and the others wait for it. What is no file for any of them may be an address."""
        seen = torch.tensor(int(Path(filename).is_file()))
        all_reduce(seen)
        if 0 < seen < self.world_size:
            raise FileNotFoundError(f'{filename} is there for {int(seen)} of {self.world_size} processes: the work '
                                    'folder, and a checkpoint that is named, has to be on a disk that all machines '
                                    'share, under the same path.')

    def resume(self, filename: str, *args, **kwargs) -> None:
        super().resume(filename, *args, **kwargs)
        if isinstance(self.train_loop, SeekableEpochLoop | SeekableIterLoop):
            self.train_loop.seek(self._meta)

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        if Path(filename).is_file():
            verify(Path(filename))
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        self._meta = checkpoint.get('meta', {})
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None,
                        save_optimizer: bool = True, save_param_scheduler: bool = True, meta: dict | None = None,
                        by_epoch: bool = True, backend_args: dict | None = None) -> None:
        meta = dict(meta or {})
        meta.setdefault('epoch', self.epoch + bool(by_epoch))
        meta.setdefault('iter', self.iter + (not by_epoch))
        if isinstance(self.train_loop, SeekableEpochLoop | SeekableIterLoop):
            meta = {**self.train_loop.position(meta), **meta}
        if file_client_args is None and backend_args is None and '://' not in out_dir:
            backend_args = dict(backend=AtomicBackend.name)
        super().save_checkpoint(out_dir, filename, file_client_args, save_optimizer, save_param_scheduler, meta,
                                by_epoch, backend_args)


def _class_of(registry: Registry, kind: str | type) -> type | None:
    """Of a ``type`` in a config: a name, a name with its scope or module, or the class itself."""
    return registry.get(kind) if isinstance(kind, str) else kind
