"""Training loops that go on in the middle of an epoch."""
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from ..registry import LOOPS
from .seeding import seed_samples, seed_step


def seekable_loader(runner, loader: dict, endless: bool) -> DataLoader:
    """The data loader of config ``loader``, with a :class:`SeekableBatchSampler` and seeded samples."""
    if not isinstance(loader, dict):
        raise TypeError(f'train_dataloader is a {type(loader).__name__}: give its config, a dict, since a resumed run '
                        'has to build one that begins in the middle of an epoch.')
    loader = dict(loader)
    batches = dict(type='mmhdistill.SeekableBatchSampler', seed=runner.base_seed, endless=endless)
    inner = loader.pop('batch_sampler', None)
    if inner is not None:
        batches['inner'] = inner
    else:
        batches['drop_last'] = loader.pop('drop_last', False)
    built = runner.build_dataloader({**loader, 'batch_sampler': batches}, seed=runner.base_seed)
    if inner is None:
        # Hooks ask for it. torch has none beside a batch sampler, and lets nobody set it.
        vars(built)['batch_size'] = built.batch_sampler.batch_size
    seed_samples(built.dataset)
    return built


@LOOPS.register_module()
class SeekableEpochLoop(EpochBasedTrainLoop):
    """mmengine's ``EpochBasedTrainLoop`` that can begin at any batch of an epoch.

    Every step is seeded by (seed, iteration, rank), every sample by (seed, epoch, place): see :mod:`.seeding`. From a
    checkpoint that was written before a validation it begins with that validation.
    """

    def __init__(self, runner, dataloader: dict, *args, **kwargs):
        super().__init__(runner, seekable_loader(runner, dataloader, endless=False), *args, **kwargs)
        self.batches_done = 0  # of the present epoch
        self._unvalidated = False

    def position(self, meta: dict) -> dict:
        """To add to the meta data of a checkpoint that counts as one of ``meta['epoch']``: batches done of how many, in
        how many processes, and whether the validations before it are done."""
        present = meta['epoch'] == self._epoch
        return dict(batches_done=self.batches_done if present else 0, batches_per_epoch=len(self.dataloader),
                    processes=self.runner.world_size, validated=present)

    def seek(self, meta: dict) -> None:
        """Go on where the checkpoint with these meta data was written.

        Raises:
            ValueError: in the middle of an epoch that had another number of batches, or whose images were dealt out
                otherwise.
        """
        now = len(self.dataloader)
        then = meta.get('batches_per_epoch', now)
        done = meta.get('batches_done')
        if done is None:
            done = 0
            if meta['iter'] != meta['epoch'] * now:
                self.runner.logger.warning(
                    f'the checkpoint, of another runner, was written after {meta["epoch"]} epochs and {meta["iter"]} '
                    f'iterations, and an epoch now has {now}: epoch {meta["epoch"] + 1} begins with its first batch')
        if done and (then != now or done > now):
            raise ValueError(f'the checkpoint was written after {done} of the {then} batches of epoch '
                             f'{meta["epoch"] + 1}, and an epoch now has {now}: give as many images to a step as '
                             'before (processes times batch_size) and the same data, or resume from the end of an '
                             'epoch, --resume .../epoch_N.pth.')
        inner, processes = self.dataloader.batch_sampler.inner, self.runner.world_size
        if done and type(inner) is not BatchSampler and meta.get('processes', processes) != processes:
            raise ValueError(f'the checkpoint was written by {meta["processes"]} processes in the middle of epoch '
                             f'{meta["epoch"] + 1}, and now there are {processes}: {type(inner).__name__} forms the '
                             'batches of each process by itself, so images would be repeated or left out. Start as '
                             'many processes as before, or resume from the end of an epoch, --resume '
                             '.../epoch_N.pth.')
        self.batches_done = done
        # Of checkpoints of other trainers it is unknown.
        self._unvalidated = meta.get('validated') is False

    def run(self) -> nn.Module:
        """Launch training."""
        self.runner.call_hook('before_train')
        if self._unvalidated:
            self._validate()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate()
        self.runner.call_hook('after_train')
        return self.runner.model

    def _validate(self) -> None:
        """If it is due."""
        self._decide_current_val_interval()
        if (self.runner.val_loop is not None and self._epoch >= self.val_begin
                and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs)):
            self.runner.val_loop.run()

    def run_epoch(self) -> None:
        """Iterate one epoch, or what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.dataloader.batch_sampler.seek(self.runner.base_seed, self._epoch, self.batches_done)
        for index, batch in enumerate(self.dataloader, self.batches_done):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.batches_done = 0

    def run_iter(self, idx: int, data_batch) -> None:
        """One step."""
        self.batches_done = idx + 1
        seed_step(self.runner.base_seed, self._iter, self.runner.rank)
        super().run_iter(idx, data_batch)


@LOOPS.register_module()
class SeekableIterLoop(IterBasedTrainLoop):
    """mmengine's ``IterBasedTrainLoop`` that goes on without loading what has been trained on.

    Data begin anew by themselves, with the same workers. Seeds, and a validation that was not done before, are as in
    :class:`SeekableEpochLoop`.
    """

    def __init__(self, runner, dataloader: dict, *args, **kwargs):
        super().__init__(runner, _Unread(seekable_loader(runner, dataloader, endless=True)), *args, **kwargs)
        self.dataloader = self.dataloader.loader
        self._unvalidated = False

    def position(self, meta: dict) -> dict:
        """To add to the meta data of a checkpoint: whether the validations before it are done."""
        return dict(validated=meta['iter'] == self._iter)

    def seek(self, meta: dict) -> None:
        """Go on where the checkpoint with these meta data was written; which batch is next, the iteration says."""
        self._unvalidated = meta.get('validated') is False

    def run(self) -> nn.Module:
        """Launch training."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        if self._unvalidated:
            self._validate()
        self.dataloader.batch_sampler.seek(self.runner.base_seed, 0, self._iter)
        self.dataloader_iterator = iter(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._validate()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _validate(self) -> None:
        """If it is due."""
        self._decide_current_val_interval()
        if (self.runner.val_loop is not None and self._iter >= self.val_begin
                and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)):
            self.runner.val_loop.run()

    def run_iter(self, data_batch) -> None:
        """One step."""
        seed_step(self.runner.base_seed, self._iter, self.runner.rank)
        super().run_iter(data_batch)


class _Unread:
    """Stands for a loader while mmengine's loop is built, which would start to read the data from their begin."""

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self.dataset = loader.dataset

    def __iter__(self):
        return iter(())
