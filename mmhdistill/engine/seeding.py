"""What a step or a sample draws comes from counters, so no state of a random generator has to be saved or restored."""
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS as ROOT_SAMPLERS
from torch.utils.data import BatchSampler, Sampler

from ..registry import DATA_SAMPLERS

_REMEMBERED = 1000  # batches; workers load a few ahead of the step [choice]
_STEP, _SAMPLE = 0, 1  # two streams of numbers that have nothing to do with each other


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Before a training step: what model and hooks draw in it depends on these three alone."""
    _seed_generators(_STEP, seed, iteration, rank)


def _seed_generators(*counters: int) -> None:
    """Of python, numpy and torch, on all devices, of this process."""
    words = np.random.SeedSequence(counters).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


class SampleIndex(NamedTuple):
    """Index of a sample, as its sampler gives it, and what its pipeline is seeded by."""
    index: object  # an int for most data sets
    counters: tuple[int, int, int]  # seed, epoch, place in the epoch


def seed_samples(dataset) -> None:
    """Have a data loader seed the pipeline of every sample by its :class:`SampleIndex`; other indices stay as they are.

    It does not matter which worker, or how many, load the samples. The data set stays itself: to a loader, and to it
    alone, it offers ``__getitems__``, where torch (>= 2.0) looks first.
    """
    dataset.__getitems__ = partial(load_samples, dataset)


def load_samples(dataset, indices: Sequence[int]) -> list:
    """Samples of a data set, each seeded by its :class:`SampleIndex` where it has one."""
    items = []
    for index in indices:
        if isinstance(index, SampleIndex):
            _seed_generators(_SAMPLE, *index.counters)
            index = index.index
        items.append(dataset[index])
    return items


@DATA_SAMPLERS.register_module()
class SeekableBatchSampler(Sampler):
    """Batches of :class:`SampleIndex`, from any batch of any epoch on; nothing before it is loaded.

    The place of a sample is counted over all processes, as samplers deal them out in turn: with twice the processes of
    half the batch it is the same.

    Args:
        sampler: of indices, of this process.
        batch_size: of this process.
        seed: that places are combined with; the sampler's own too where it was built with this one.
        inner: config of another batch sampler; plain batches if None.
        drop_last: leave out a last batch that is not full; not with ``inner``, which has its own.
        endless: go on with the next epoch, for loops that count iterations.
    """

    def __init__(self, sampler: Sampler, batch_size: int, seed: int, inner: dict | None = None,
                 drop_last: bool = False, endless: bool = False):
        self.sampler = sampler
        self.batch_size = batch_size
        self.endless = endless
        if inner is None:
            self.inner = BatchSampler(sampler, batch_size, drop_last)
        else:
            self.inner = ROOT_SAMPLERS.build(inner, default_args=dict(sampler=sampler, batch_size=batch_size))
        self._seed, self._epoch, self._start = seed, 0, 0
        self._issued: dict[int, list[SampleIndex]] = {}

    def seek(self, seed: int, epoch: int, start: int) -> None:
        """Passes are over ``epoch`` from now on; the next one leaves out its first ``start`` batches."""
        if getattr(self.sampler, 'seed', None) == self._seed:
            self.sampler.seed = seed
        self._seed, self._epoch, self._start = seed, epoch, start

    def issued(self, number: int) -> list[SampleIndex]:
        """Batch ``number`` of the present pass, counted from its true begin: one of the last that were asked for."""
        return self._issued[number]

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        rank, world_size = get_dist_info()
        epoch, number = self._epoch, -1
        # Of this pass alone: a hook may have one of its own.
        start, self._start = self._start, 0
        self._issued.clear()
        while True:
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            place = 0
            for batch in self.inner:
                first, place, number = place, place + len(batch), number + 1
                if number < start:
                    continue
                self._issued[number] = [SampleIndex(index, (self._seed, epoch, (first + i) * world_size + rank))
                                        for i, index in enumerate(batch)]
                self._issued.pop(number - _REMEMBERED, None)
                yield self._issued[number]
            if not self.endless or not place:
                return
            epoch += 1

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.inner)
