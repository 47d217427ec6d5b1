import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import DataLoader, Dataset

import mmhdistill.engine.seeding as seeding
from mmhdistill.engine.seeding import SampleIndex, SeekableBatchSampler, seed_samples, seed_step


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_step__each_counter_counts_and_the_past_does_not():
    found = {}
    for counters in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 0), (2**31, 10**6, 7)]:
        seed_step(*counters)
        found[counters] = draw()
    for numbers in zip(*found.values()):
        assert len(set(numbers)) == len(found)
    draw()
    seed_step(0, 1, 0)
    assert draw() == found[0, 1, 0]


def test_seed_step__is_another_stream_than_samples():
    seed_step(3, 4, 5)
    step = draw()
    seeding._seed_generators(seeding._SAMPLE, 3, 4, 5)
    assert all(a != b for a, b in zip(step, draw()))


def test_load_samples__indices_are_those_of_the_sampler_of_any_type():
    """mmdet's of videos are (video, frame); a worker that is not forked gets them pickled."""
    indices = [(2, 1), (0, 3), 'a', 4]
    sampler = SeekableBatchSampler(indices, 4, seed=0)
    batch = pickle.loads(pickle.dumps(next(iter(sampler))))
    samples = seeding.load_samples({index: index for index in indices}, batch)
    assert samples == indices and [type(sample) for sample in samples] == [tuple, tuple, str, int]
    assert batch == [SampleIndex(index, (0, 0, place)) for place, index in enumerate(indices)]


class Drawing(Dataset):
    """Its samples are their index and three random numbers."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        assert type(index) is int
        return (index, *draw())


def samples(epoch=0, start=0, workers=0, seed=0):
    """Those of an epoch, batch by batch, as drawn."""
    dataset = Drawing()
    seed_samples(dataset)
    sampler = SeekableBatchSampler(DefaultSampler(dataset, seed=0), 3, seed=0)
    sampler.seek(seed, epoch, start)
    return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list))


def test_seed_samples__by_epoch_and_place_whatever_loads_them():
    whole = samples()
    assert [len(batch) for batch in whole] == [3, 3, 1]
    assert sorted(item[0] for batch in whole for item in batch) == list(range(7))
    assert len({item[1] for batch in whole for item in batch}) == 7
    torch.manual_seed(123)
    assert samples() == whole
    assert samples(workers=2) == whole
    assert samples(start=1, workers=2) == whole[1:]
    assert samples(start=3) == []
    other = samples(epoch=1)
    assert {item[1:] for batch in other for item in batch}.isdisjoint(item[1:] for batch in whole for item in batch)
    assert {item[1:] for batch in samples(seed=1) for item in batch}.isdisjoint(
        item[1:] for batch in whole for item in batch)


def test_seed_samples__leaves_other_indices_alone():
    dataset = Drawing()
    seed_samples(dataset)
    torch.manual_seed(0)
    expected = float(torch.rand(()))
    torch.manual_seed(0)
    assert dataset[1][3] == expected
    torch.manual_seed(0)
    assert dataset.__getitems__([1])[0][3] == expected
    # As a worker that is not forked gets it.
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.__getitems__.args[0] is copy


@pytest.mark.parametrize('world_size', [1, 2])
def test_seekable_batch_sampler__places_are_counted_over_all_processes(world_size, monkeypatch):
    """An image draws the same in two processes of two images as in one of four."""
    found = {}
    for rank in range(world_size):
        for module in ('mmengine.dataset.sampler', 'mmhdistill.engine.seeding'):
            monkeypatch.setattr(f'{module}.get_dist_info', lambda rank=rank: (rank, world_size))
        sampler = SeekableBatchSampler(DefaultSampler(range(8), seed=5), 4 // world_size, seed=5)
        for batch in sampler:
            found.update(batch)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5)).tolist()
    assert found == {index: (5, 0, place) for place, index in enumerate(order)}


def test_seekable_batch_sampler__a_resumed_seed_is_the_samplers_too():
    def order(built, resumed, own=None):
        sampler = SeekableBatchSampler(DefaultSampler(range(9), seed=built if own is None else own), 9, seed=built)
        sampler.seek(resumed, 0, 0)
        return [index for index, _ in next(iter(sampler))]

    assert order(1, 2) == order(2, 2) != order(1, 1)
    # One that the config gives is left.
    assert order(1, 2, own=7) == order(1, 1, own=7)


@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
def test_seekable_batch_sampler__endless_passes_begin_anywhere(sampler):
    def batches(start, number):
        found = SeekableBatchSampler(sampler(range(5), seed=0), 2, seed=0, endless=True)
        found.seek(0, 0, start)
        return [batch for _, batch in zip(range(number), found)]

    whole = batches(0, 8)
    assert batches(5, 3) == whole[5:]
    numbered = SeekableBatchSampler(sampler(range(5), seed=0), 2, seed=0, endless=True)
    numbered.seek(0, 0, 5)
    for number, batch in zip(range(5, 1010), numbered):
        assert numbered.issued(number) == batch
    assert numbered.issued(10) and len(numbered._issued) == 1000
    assert len({counters for batch in whole for _, counters in batch}) == sum(map(len, whole))
    assert [len(batch) for batch in whole] == ([2, 2, 1] * 3)[:8] if sampler is DefaultSampler else [2] * 8


def test_seekable_batch_sampler__a_second_pass_is_whole():
    """Of the same epoch: a hook may have one, in its middle or after it."""
    sampler = SeekableBatchSampler(DefaultSampler(range(7), seed=0), 2, seed=0)
    sampler.seek(0, 3, 0)
    whole = list(sampler)
    sampler.seek(0, 3, 2)
    first = iter(sampler)
    rest = [next(first)]
    assert list(sampler) == whole
    assert [*rest, *first] == whole[2:]
    assert list(sampler) == whole and len(whole) == 4


def test_seekable_batch_sampler__of_another_batch_sampler():
    loader = SeekableBatchSampler(
        DefaultSampler(range(5), shuffle=False), 2, seed=0, inner=dict(type='BatchSampler', drop_last=True)
        if _register() else None)
    assert [[index for index, _ in batch] for batch in loader] == [[0, 1], [2, 3]] and len(loader) == 2
    assert len(SeekableBatchSampler(DefaultSampler(range(5)), 2, seed=0)) == 3
    assert len(SeekableBatchSampler(DefaultSampler(range(5)), 2, seed=0, drop_last=True)) == 2


def _register():
    from mmengine.registry import DATA_SAMPLERS
    from torch.utils.data import BatchSampler
    if 'BatchSampler' not in DATA_SAMPLERS:
        DATA_SAMPLERS.register_module(module=BatchSampler)
    return True
