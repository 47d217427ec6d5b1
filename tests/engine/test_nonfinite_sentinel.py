import copy
import json
import math
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import Sampler

import mmhdistill.engine.hooks.nonfinite_sentinel as module
from mmhdistill.engine import NonFiniteSentinel
from mmhdistill.engine.replay import _range, as_table, forward, plain_model, replay, watch_layers
from mmhdistill.engine.runner import ResumableRunner
from tests.engine.resumable import BATCH, Act, Images, assert_same_end, config, last, output, run, signal_self
from tests.helpers import build_distiller, random_images


class Spoilt(Images):
    """Image 5 is infinite in one place."""

    bad = (5, )

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index in self.bad:
            sample['inputs'][0, 0, 0] = math.inf
        return sample


class AllSpoilt(Spoilt):
    bad = range(100)


def loader(dataset):
    return dict(batch_size=BATCH, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=True))


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / 'nonfinite').glob('*.json')}


class Watch(Hook):
    """Notes after which iterations the weights have moved."""

    priority = 'LOWEST'

    def __init__(self, folder):
        self.folder = folder

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.before = [p.detach().clone() for p in runner.model.parameters()]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        same = all(torch.equal(a, b) for a, b in zip(self.before, runner.model.parameters()))
        with (self.folder / 'moved.txt').open('a') as file:
            file.write(json.dumps([runner.iter, not same]) + '\n')


@pytest.mark.parametrize('world_size', [1, 2])
def test_skip__steps_of_a_spoilt_image_are_recorded_and_change_nothing(world_size, tmp_path):
    assert set(run(tmp_path, world_size, train_dataloader=loader(Spoilt()), hooks=(Watch(tmp_path), ))) == {0}
    found = records(tmp_path)
    iterations = sorted({record['iteration'] for record in found.values()})
    assert len(iterations) == 3 and len(found) == 3 * world_size  # once an epoch, by every process
    for name, record in found.items():
        assert name == f'iter_{record["iteration"]}_rank_{record["rank"]}'
        has_it = 5 in [index for index, _ in record['samples']]
        assert has_it is not any(map(math.isfinite, record['losses'].values()))
        assert all(counters[1] == record['epoch'] for _, counters in record['samples'])
        assert (record['layers']['backbone.layers.0']['nonfinite'] > 0) is has_it
        # The other process has them by the mean over both.
        assert record['gradients']
    assert world_size == 1 or sorted(5 in [i for i, _ in record['samples']] for record in found.values()) == [
        False] * 3 + [True] * 3
    moved = [json.loads(line) for line in (tmp_path / 'moved.txt').read_text().splitlines()]
    assert sorted({iteration for iteration, changed in moved if not changed}) == iterations
    assert output(tmp_path).count('The step is skipped (') == output(tmp_path).count(' in a row, at most 3)') == 3
    # Of the last row alone.
    kept = max((record['checkpoint'] or '' for record in found.values()), key=lambda name: (len(name), name))
    assert [path.name for path in (tmp_path / 'nonfinite').glob('*.pth')] == [kept]
    assert all(x.isfinite().all() for x in last(tmp_path)['state_dict'].values())


def test_skip__a_killed_run_ends_with_the_same_bits(tmp_path):
    spoilt = dict(train_dataloader=loader(Spoilt()))
    assert run(tmp_path / 'whole', **spoilt) == [0]
    iteration = sorted(record['iteration'] for record in records(tmp_path / 'whole').values())[1]
    kill = Act(partial(signal_self, signal.SIGKILL), iteration)
    assert run(tmp_path / 'cut', hooks=(kill, ), **spoilt) == [-signal.SIGKILL]
    assert run(tmp_path / 'cut', **spoilt) == [0]
    assert_same_end(tmp_path / 'cut', tmp_path / 'whole')


@pytest.mark.parametrize('max_skips, world_size', [(2, 1), (0, 2)])
def test_stop__after_too_many_in_a_row(max_skips, world_size, tmp_path):
    sentinel = dict(type='mmhdistill.NonFiniteSentinel', max_skips=max_skips)
    codes = run(tmp_path, world_size, train_dataloader=loader(AllSpoilt()), default_hooks=dict(sentinel=sentinel))
    assert codes == [1] * world_size
    text = output(tmp_path)
    assert text.count('The step is skipped') == max_skips
    assert f'FloatingPointError: iteration {max_skips + 1}: loss or gradients are not finite' in text
    assert f'{max_skips + 1} steps in a row: training ends. Look at the layers with tools/replay.py' in text
    found = records(tmp_path)
    assert sorted(found) == [f'iter_{i}_rank_{rank}' for i in range(max_skips + 1) for rank in range(world_size)]
    assert found['iter_0_rank_0']['checkpoint'] == 'iter_0.pth'
    assert {record['checkpoint'] for record in found.values() if record['iteration']} <= {None}
    assert list(tmp_path.glob('*.pth')) == []


def test_gradients__that_are_not_finite_at_a_finite_loss(tmp_path):
    """The root of zero has an infinite slope."""
    class Root(Hook):

        def before_run(self, runner):
            model = runner.model
            plain = model.loss

            def loss(images):
                losses = plain(images)
                zero = (model.backbone.cls_token * 0).sum()
                return {**losses, 'loss/root': zero.sqrt()} if runner.iter == 2 else losses

            model.loss = loss

    assert run(tmp_path, hooks=(Root(), )) == [0]
    record, = records(tmp_path).values()
    assert record['iteration'] == 2 and record['losses']['loss/root'] == 0
    assert record['gradients'] == ['backbone.cls_token']


class InfiniteLoss(Hook):
    """Of the second process alone, without a gradient."""

    def before_run(self, runner):
        model = plain_model(runner)
        plain = model.loss

        def loss(images):
            spoilt = runner.iter == 2 and runner.rank == 1
            return {**plain(images), 'loss/constant': torch.tensor(math.inf if spoilt else 0.0)}

        model.loss = loss


def test_loss__that_one_process_has_is_skipped_by_all(tmp_path):
    assert run(tmp_path, 2, hooks=(InfiniteLoss(), )) == [0, 0]
    found = records(tmp_path)
    assert sorted(found) == ['iter_2_rank_0', 'iter_2_rank_1']
    assert [math.isfinite(found[name]['losses']['loss']) for name in sorted(found)] == [True, False]
    assert all(record['gradients'] == [] for record in found.values())


class Poison(Hook):
    """Weights become infinite behind the optimizer's back."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 4:
            runner.model.backbone.cls_token.data[..., 0] = math.inf


def test_before_save_checkpoint__a_poisoned_one_is_never_written(tmp_path):
    assert run(tmp_path, hooks=(Poison(), )) == [1]
    assert 'FloatingPointError' in output(tmp_path)
    assert last(tmp_path)['meta']['iter'] == 3
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['iter_3.pth']


def test_before_save_checkpoint__of_a_model_that_saves_a_part_of_itself():
    """As one with adapters does, whose frozen weights are those of a file."""
    runner, sentinel = SimpleNamespace(model=nn.Linear(2, 2)), NonFiniteSentinel()
    sentinel.before_save_checkpoint(runner, dict(state_dict=dict(bias=torch.zeros(2))))
    with pytest.raises(FloatingPointError, match=r'^1 tensors are not finite \(bias\): the checkpoint is not written'):
        sentinel.before_save_checkpoint(runner, dict(state_dict=dict(bias=torch.tensor([0, math.inf]))))


class Normed(BaseModel):
    """Its running statistics are those of the images."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Conv2d(3, 1, 1)

    def forward(self, inputs, mode='tensor'):
        return {'loss/square': self.head(self.norm(torch.stack(inputs) / 255)).square().mean()}


class Odd(Normed):
    """A parameter without a value, which has a gradient, and a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, inputs, mode='tensor'):
        return {**super().forward(inputs, mode), 'loss/empty': self.empty.sum()}

    def get_extra_state(self):
        return dict(version=2)

    def set_extra_state(self, state):
        assert state == dict(version=2)


def test_model__with_a_parameter_of_no_value_and_a_state_that_is_no_tensor(tmp_path):
    settings = dict(model=Odd(), custom_hooks=[], train_dataloader=loader(Spoilt()))
    stop = dict(settings, custom_hooks=[Act(partial(signal_self, signal.SIGTERM), 15)])
    assert run(tmp_path, **stop) == [128 + signal.SIGTERM], output(tmp_path)
    assert run(tmp_path, **settings) == [0], output(tmp_path)
    assert len(records(tmp_path)) == 3
    state = last(tmp_path)['state_dict']
    assert state['_extra_state'] == dict(version=2) and state['empty'].shape == (0, 3)


def test_before_save_checkpoint__states_that_are_no_tensors():
    runner, sentinel = SimpleNamespace(model=nn.Linear(2, 2)), NonFiniteSentinel()
    state = dict(_extra_state=dict(rate=math.nan), bias=torch.zeros(2), mean=torch.zeros(2))
    sentinel.before_save_checkpoint(runner, dict(state_dict=state))
    with pytest.raises(FloatingPointError, match=r'^1 tensors are not finite \(mean\)'):
        sentinel.before_save_checkpoint(runner, dict(state_dict=dict(state, mean=torch.tensor([0, math.nan]))))


class Adversaries(Normed):
    """As a GAN has: two optimizers."""

    def train_step(self, data, optim_wrapper):
        losses = self(**self.data_preprocessor(data, True), mode='loss')
        losses['loss/square'].backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
            wrapper.zero_grad()
        return losses


def test_several_optimizers__are_left_alone_and_told(tmp_path):
    model = Adversaries()
    wrappers = OptimWrapperDict(**{name: OptimWrapper(torch.optim.SGD(part.parameters(), 0.1, momentum=0.9))
                                   for name, part in model.named_children() if name in ('norm', 'head')})
    settings = dict(model=model, optim_wrapper=wrappers, param_scheduler=None, custom_hooks=[])
    assert run(tmp_path / 'whole', **settings) == [0], output(tmp_path / 'whole')
    assert output(tmp_path / 'whole').count('NonFiniteSentinel watches a single optimizer: it does nothing here') == 1
    stop = Act(partial(signal_self, signal.SIGTERM), 11)
    assert run(tmp_path / 'cut', **dict(settings, custom_hooks=[stop])) == [128 + signal.SIGTERM]
    assert run(tmp_path / 'cut', **settings) == [0], output(tmp_path / 'cut')
    one, two = (last(tmp_path / folder)['state_dict'] for folder in ('whole', 'cut'))
    assert [name for name, x in one.items() if not torch.equal(x, two[name])] == []
    assert not torch.equal(one['head.weight'], model.head.weight)


@pytest.mark.parametrize('world_size, steps', [(1, 21), (2, 12)])
def test_skip__running_statistics_are_those_before_the_step(world_size, steps, tmp_path):
    codes = run(tmp_path, world_size, model=Normed(), custom_hooks=[], train_dataloader=loader(Spoilt()))
    assert set(codes) == {0}, output(tmp_path)
    end = last(tmp_path)
    assert end['meta']['iter'] == steps
    assert int(end['state_dict']['norm.num_batches_tracked']) == steps - 3
    checkpoint, = (tmp_path / 'nonfinite').glob('*.pth')
    before = torch.load(checkpoint, weights_only=True)
    assert int(before['state_dict']['norm.num_batches_tracked']) == before['meta']['iter'] - 2
    for state in (end['state_dict'], before['state_dict']):
        assert all(x.isfinite().all() for x in state.values())
        # A pixel is (127.5 + 20 of noise) / 255, a little less where it would be over 255.
        mean = 0.575 * (1 - 0.9**int(state['norm.num_batches_tracked']))
        assert state['norm.running_mean'].tolist() == pytest.approx([mean] * 3, abs=0.04)


def fail_in_the_second(rank):
    def forward(*args):
        raise RuntimeError('CUDA out of memory')

    if rank == 1:
        module.forward = forward


def test_skip__a_record_that_fails_in_one_process_ends_none(tmp_path):
    assert run(tmp_path, 2, before=fail_in_the_second, train_dataloader=loader(Spoilt())) == [0, 0], output(tmp_path)
    assert output(tmp_path, 1).count('no record could be written (RuntimeError: CUDA out of memory)') == 3
    assert len(records(tmp_path)) == 3 and {record['rank'] for record in records(tmp_path).values()} == {0}
    assert all(x.isfinite().all() for x in last(tmp_path)['state_dict'].values())


@pytest.mark.parametrize('norm, processes, ends', [(nn.SyncBatchNorm, 2, True), (nn.SyncBatchNorm, 1, False),
                                                   (nn.BatchNorm2d, 2, False)])
def test_skip__a_forward_that_lacks_memory_ends_a_process_whose_norms_talk_to_others(norm, processes, ends, tmp_path,
                                                                                    monkeypatch):
    def record(*args):
        raise torch.cuda.OutOfMemoryError('80 GiB')

    model, said = nn.Sequential(norm(3)), []
    runner = SimpleNamespace(model=model, world_size=processes, work_dir=tmp_path, iter=0,
                             logger=SimpleNamespace(error=said.append))
    hook = NonFiniteSentinel()
    hook._buffers = {name: x.clone() for name, x in model.named_buffers()}
    monkeypatch.setattr(hook, '_record', record)
    if ends:
        with pytest.raises(torch.cuda.OutOfMemoryError, match='80 GiB'):
            hook._skip(runner)
    else:
        hook._skip(runner)
        assert 'no record could be written (OutOfMemoryError: 80 GiB)' in said[0]


class OwnLoop(EpochBasedTrainLoop):
    pass


def test_skip__in_a_loop_of_others_the_samples_are_unknown(tmp_path):
    training = dict(type=OwnLoop, max_epochs=1)
    assert run(tmp_path, train_cfg=training, train_dataloader=loader(Spoilt())) == [0], output(tmp_path)
    record, = records(tmp_path).values()
    assert record['samples'] is None and record['gradients']
    with pytest.raises(ValueError, match='the record does not say which samples the step had'):
        replay(None, record)


def test_replay__computes_the_recorded_step_again(tmp_path):
    assert run(tmp_path, amp=True, train_dataloader=loader(Spoilt())) == [0]
    checkpoint, = (tmp_path / 'nonfinite').glob('*.pth')
    record = records(tmp_path)[f'{checkpoint.stem}_rank_0']

    def build(folder, path=checkpoint):
        settings = config(tmp_path / folder, amp=True, train_dataloader=loader(Spoilt()), load_from=str(path))
        return ResumableRunner(**settings, experiment_name=f'{tmp_path.name}-{folder}')

    runner = build('replay')
    found = replay(runner, copy.deepcopy(record))
    assert json.loads(json.dumps(found['layers'])) == record['layers']
    assert found['gradients'] == record['gradients']
    assert {name: str(x) for name, x in found['losses'].items()} == {
        name: str(x) for name, x in record['losses'].items()}
    assert set(found['layers']) == {
        f'{vit}.layers.{i}' for vit in ('backbone', 'teachers.clip', 'teachers.mae') for i in range(3)}
    with pytest.raises(ValueError, match=r'written after \d+ iterations, and the record is of the one after '):
        replay(build('other', tmp_path / 'iter_21.pth'), record)


class Frames(Sampler):
    """Its indices are (video, frame), as mmdet's; numpy counts the videos."""

    def __init__(self, dataset, seed=None):
        pass

    def __iter__(self):
        return iter([(np.int64(video), frame) for video in range(2) for frame in range(7)])

    def __len__(self):
        return 14


class Videos(Images):

    def __getitem__(self, index):
        video, frame = index
        sample = super().__getitem__(7 * int(video) + frame)
        if index == (1, 4):
            sample['inputs'][0, 0, 0] = math.inf
        return sample


def test_replay__of_samples_whose_indices_are_no_integers(tmp_path):
    settings = dict(param_scheduler=None, train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
                    train_dataloader=dict(batch_size=BATCH, num_workers=1, dataset=Videos(), sampler=dict(type=Frames)))
    assert run(tmp_path, **settings) == [0], output(tmp_path)
    (name, record), = records(tmp_path).items()
    assert name == 'iter_5_rank_0' and record['samples'] == [[[1, 3], [3, 0, 10]], [[1, 4], [3, 0, 11]]]
    again = config(tmp_path / 'again', **settings, load_from=str(tmp_path / 'nonfinite/iter_5.pth'))
    found = replay(ResumableRunner(**again, experiment_name=tmp_path.name), record)
    assert json.loads(json.dumps(found['layers'])) == record['layers']
    assert found['gradients'] == record['gradients'] != []


def test_forward__is_the_step_itself(tmp_path):
    """Losses, drawn numbers included, of the second forward are those that were logged."""
    found = []

    class Again(Hook):

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            with torch.no_grad():
                runner.model.load_state_dict(self.before)
                losses, _ = forward(plain_model(runner), runner.optim_wrapper, data_batch, runner.base_seed,
                                    runner.iter, runner.rank)
            found.append([float(outputs['loss']), float(losses['loss'])])
            runner.train_loop.stop_training = True

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.before = copy.deepcopy(runner.model.state_dict())

    settings = config(tmp_path, hooks=(Again(), ), param_scheduler=None)
    settings['train_cfg'] = dict(type='EpochBasedTrainLoop', max_epochs=1)
    ResumableRunner(**settings, experiment_name=tmp_path.name).train()
    assert len(found) == 7 and all(a == b for a, b in found)
    assert len({a for a, _ in found}) == 7


def test_watch_layers__ranges_by_hand():
    model = build_distiller().eval()
    images = random_images()
    block = model.backbone.layers[1]
    with watch_layers(model) as layers, torch.no_grad():
        tokens = model.backbone.encode(images, {1: frozenset({'hidden'}), 0: frozenset({'hidden'})})
    x = tokens.taps[0, 'hidden']
    q, k, _ = block.attn.qkv(block.ln1(x)).detach().chunk(3, -1)
    q, k = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (q, k))
    scores = q @ k.transpose(-1, -2) / 8**0.5
    assert list(layers) == ['backbone.layers.0', 'backbone.layers.1']
    assert layers['backbone.layers.1']['scores'] == pytest.approx([float(scores.min()), float(scores.max())])
    assert layers['backbone.layers.1']['tokens'] == pytest.approx([float(x.min()), float(x.max())])
    assert layers['backbone.layers.1']['nonfinite'] == 0
    # Watched inside of the block alone.
    model.backbone.encode(images, {2: frozenset({'hidden'})})
    assert list(layers) == ['backbone.layers.0', 'backbone.layers.1']


@pytest.mark.parametrize('parts, expected', [
    ([[-5, math.nan, 1], [2, math.inf, -math.inf, -1]], ([-5, 2], 3)),
    ([[math.nan], [0.5]], ([0.5, 0.5], 1)), ([[math.nan], [math.inf, math.inf]], (None, 3)), ([], (None, 0))])
def test_range__over_parts(parts, expected):
    assert _range(torch.tensor(part, dtype=torch.float32) for part in parts) == expected


def test_as_table__finite_or_not():
    lines = as_table({'backbone.layers.0': dict(tokens=[-1.0, 2.5], scores=None, nonfinite=7)}).splitlines()
    assert lines[0].split() == ['layer', 'tokens', 'attention', 'scores', 'not', 'finite']
    assert lines[1].split() == ['backbone.layers.0', '-1', 'to', '2.5', 'none', 'is', 'finite', '7']


def test_nonfinite_sentinel__refuses_a_negative_number():
    with pytest.raises(ValueError, match='max_skips=-1: give how many steps'):
        NonFiniteSentinel(max_skips=-1)
