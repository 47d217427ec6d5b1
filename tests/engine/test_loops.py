import signal
from functools import partial

import pytest
import torch
from mmpretrain.engine.hooks import PreciseBNHook
from torch.utils.data import BatchSampler

from mmhdistill.engine.runner import ResumableRunner
from tests.engine.resumable import Act, Images, assert_same_end, config, last, output, run, signal_self, validated
from tests.engine.test_nonfinite_sentinel import Normed

KILL = partial(signal_self, signal.SIGKILL)


def validations(folder):
    return [int(line) for line in (folder / 'validated.txt').read_text().splitlines()]


@pytest.fixture(scope='module', params=[False, True], ids=['epochs', 'iterations'])
def iters(request):
    return request.param


@pytest.fixture(scope='module')
def whole(iters, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    assert run(folder, **validated(folder, iters=iters)) == [0], output(folder)
    return folder


@pytest.mark.parametrize('iteration', [14, 21])
def test_validation__killed_in_one_it_is_done_by_the_resumed_run(iteration, iters, tmp_path, whole):
    """The best checkpoint and the learning rate come of it; the last one of training has no other chance."""
    act = Act(KILL, iteration, 'before_val_epoch')
    assert run(tmp_path, **validated(tmp_path, act, iters=iters)) == [-signal.SIGKILL]
    meta = last(tmp_path)['meta']
    assert (meta['iter'], meta['validated']) == (iteration, False)
    assert run(tmp_path, **validated(tmp_path, iters=iters)) == [0], output(tmp_path)
    assert_same_end(tmp_path, whole)
    assert validations(tmp_path) == validations(whole) == [7, 14, 21]
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == sorted(path.name for path in whole.glob('*.pth'))
    for end in (last(tmp_path), last(whole)):
        assert end['message_hub']['runtime_info']['best_score'] == 21
        assert end['optimizer']['param_groups'][0]['lr'] == pytest.approx(2.5e-4, rel=1e-12)
        assert end['meta']['validated'] is True


def test_validation__that_is_done_is_not_done_again(iters, whole):
    assert run(whole, **validated(whole, iters=iters)) == [0]
    assert validations(whole) == [7, 14, 21]


def test_validation__none_was_pending_where_a_checkpoint_does_not_say_so(tmp_path):
    loop = ResumableRunner(**config(tmp_path), experiment_name=tmp_path.name).train_loop
    for meta, pending in ((dict(), False), (dict(validated=True), False), (dict(validated=False), True)):
        loop.seek(dict(meta, epoch=1, iter=7))
        assert loop._unvalidated is pending


@pytest.mark.parametrize('iterations, told', [(14, False), (16, True), (8, True)])
def test_seek__checkpoint_of_another_runner_begins_the_epoch(iterations, told, tmp_path, monkeypatch):
    runner = ResumableRunner(**config(tmp_path), experiment_name=tmp_path.name)
    said = []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    runner.train_loop.seek(dict(epoch=2, iter=iterations))
    assert runner.train_loop.batches_done == 0
    assert [f'after 2 epochs and {iterations} iterations, and an epoch now has 7' in text for text in said] == (
        [True] * told)


class Grouped(BatchSampler):
    """Stands for one that sorts the images of its process into batches."""


@pytest.mark.parametrize('batch_sampler, size', [
    (dict(), 4), (dict(batch_sampler=None), 4), (dict(batch_sampler=dict(type=Grouped, drop_last=True)), None)])
def test_seekable_loader__has_the_batch_size_and_drop_last_of_mmengines(batch_sampler, size, tmp_path):
    """Which has no batch size either where a batch sampler is named."""
    options = dict(batch_sampler, **(dict() if size is None else dict(drop_last=True)))
    loader = dict(batch_size=4, num_workers=0, dataset=Images(), sampler=dict(type='DefaultSampler'), **options)
    built = ResumableRunner(**config(tmp_path, train_dataloader=loader), experiment_name=tmp_path.name).train_dataloader
    assert built.batch_size == size
    assert [len(batch['inputs']) for batch in built] == [4, 4, 4] and len(built) == 3


def test_precise_bn__of_a_run_that_was_stopped_in_the_middle_of_an_epoch(tmp_path):
    """mmpretrain's hook goes over the images of each epoch once more."""
    settings = dict(model=Normed(), param_scheduler=None, custom_hooks=[PreciseBNHook(num_samples=14)], workers=1)
    assert run(tmp_path / 'whole', **settings) == [0], output(tmp_path / 'whole')
    stop = Act(partial(signal_self, signal.SIGTERM), 16)
    cut = dict(settings, custom_hooks=[*settings['custom_hooks'], stop])
    assert run(tmp_path / 'cut', **cut) == [128 + signal.SIGTERM], output(tmp_path / 'cut')
    assert run(tmp_path / 'cut', **settings) == [0], output(tmp_path / 'cut')
    one, two = (last(tmp_path / folder)['state_dict'] for folder in ('whole', 'cut'))
    assert [name for name, x in one.items() if not torch.equal(x, two[name])] == []
    # The mean of the images; a running one would lack 0.9**21 of it.
    assert one['norm.running_mean'].tolist() == pytest.approx([0.575] * 3, abs=0.03)


def test_seek__other_processes_where_batches_are_formed_by_each(tmp_path):
    loop = ResumableRunner(**config(tmp_path), experiment_name=tmp_path.name).train_loop
    assert loop.position(dict(epoch=0)) == dict(
        batches_done=0, batches_per_epoch=7, processes=1, validated=True)
    meta = dict(epoch=0, iter=3, batches_done=3, batches_per_epoch=7, processes=2)
    loop.seek(meta)
    assert loop.batches_done == 3
    sampler = loop.dataloader.batch_sampler
    sampler.inner = Grouped(sampler.sampler, 2, False)
    message = 'written by 2 processes in the middle of epoch 1, and now there are 1: Grouped forms the batches of each'
    with pytest.raises(ValueError, match=message):
        loop.seek(meta)
    for same in (dict(meta, processes=1), dict(meta, batches_done=0)):
        loop.seek(same)
        assert loop.batches_done == same['batches_done']
