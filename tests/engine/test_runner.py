import signal
from functools import partial
from pathlib import PosixPath

import pytest
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

import mmhdistill.engine.runner as module
from mmhdistill.engine import SeekableEpochLoop, SeekableIterLoop, WholeCheckpointHook
from mmhdistill.engine.runner import ResumableRunner
from tests.engine.resumable import Act, config, output, run, signal_self


def build(folder, **kwargs):
    return ResumableRunner(**config(folder, **kwargs), experiment_name=folder.name)


class OwnLoop(EpochBasedTrainLoop):
    pass


class OwnHook(CheckpointHook):
    pass


@pytest.mark.parametrize('kind, expected', [
    ('EpochBasedTrainLoop', SeekableEpochLoop), ('mmengine.EpochBasedTrainLoop', SeekableEpochLoop),
    ('mmengine.runner.EpochBasedTrainLoop', SeekableEpochLoop), (EpochBasedTrainLoop, SeekableEpochLoop),
    ('mmengine.runner.loops.IterBasedTrainLoop', SeekableIterLoop), (IterBasedTrainLoop, SeekableIterLoop),
    ('mmhdistill.SeekableIterLoop', SeekableIterLoop)])
def test_build_train_loop__whatever_way_a_type_is_written(kind, expected, tmp_path, monkeypatch):
    length = dict(max_epochs=2) if expected is SeekableEpochLoop else dict(max_iters=14)
    runner, messages = build(tmp_path, train_cfg=dict(type=kind, **length)), []
    monkeypatch.setattr(runner.logger, 'warning', messages.append)
    assert type(runner.train_loop) is expected and runner.train_loop.max_iters == 14
    assert messages == []


@pytest.mark.parametrize('by_epoch, expected', [(True, SeekableEpochLoop), (False, SeekableIterLoop)])
def test_build_train_loop__without_a_type(by_epoch, expected, tmp_path):
    length = dict(max_epochs=2) if by_epoch else dict(max_iters=14)
    assert type(build(tmp_path, train_cfg=dict(by_epoch=by_epoch, **length)).train_loop) is expected


@pytest.mark.parametrize('by_epoch', [True, False])
def test_build_train_loop__of_a_config_of_another_project(by_epoch, tmp_path):
    """What ``_base_ = 'mmseg::...'`` brings has the scope beside its options, where build() takes it away."""
    loop = (dict(type='EpochBasedTrainLoop', max_epochs=2) if by_epoch else
            dict(type='IterBasedTrainLoop', max_iters=14, val_interval=7))
    runner = build(tmp_path, train_cfg=dict(loop, _scope_='mmpretrain'),
                   default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=4, _scope_='mmpretrain')))
    assert type(runner.train_loop) is (SeekableEpochLoop if by_epoch else SeekableIterLoop)
    assert runner.train_loop.max_iters == 14
    assert [hook.interval for hook in runner.hooks if isinstance(hook, WholeCheckpointHook)] == [4]


def test_build_train_loop__one_of_others_is_left_and_told(tmp_path, monkeypatch):
    runner, messages = build(tmp_path, train_cfg=dict(type=OwnLoop, max_epochs=2)), []
    monkeypatch.setattr(runner.logger, 'warning', messages.append)
    loop = runner.train_loop
    # As train() does once more.
    assert type(loop) is OwnLoop and runner.build_train_loop(loop) is loop
    message, = messages
    assert message.startswith('OwnLoop is no train loop of mmengine or mmhdistill: it resumes as it does by itself')


@pytest.mark.parametrize('kind, expected', [
    ('CheckpointHook', WholeCheckpointHook), ('mmengine.CheckpointHook', WholeCheckpointHook),
    ('mmengine.hooks.CheckpointHook', WholeCheckpointHook), (CheckpointHook, WholeCheckpointHook),
    (None, WholeCheckpointHook), (OwnHook, OwnHook)])
def test_register_default_hooks__whatever_way_a_type_is_written(kind, expected, tmp_path):
    options = dict(interval=4) if kind is None else dict(interval=4, type=kind)
    runner = build(tmp_path, default_hooks=dict(checkpoint=options))
    hook, = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    assert type(hook) is expected and hook.interval == 4


class _Unseen(PosixPath):

    def is_file(self):
        return False


def blind_the_second(rank):
    """Its machine has another disk at the same path."""
    if rank == 1:
        module.Path = _Unseen


def test_load_or_resume__a_checkpoint_that_one_process_does_not_see(tmp_path):
    """All end, by name or not; none waits for the one that does not find it."""
    stop = Act(partial(signal_self, signal.SIGTERM), 2)
    assert run(tmp_path, 2, hooks=(stop, )) == [128 + signal.SIGTERM] * 2, output(tmp_path)
    path = tmp_path / 'interrupted.pth'
    for count, named in enumerate((dict(), dict(load_from=str(path))), 1):
        assert run(tmp_path, 2, before=blind_the_second, **named) == [1, 1]
        for rank in (0, 1):
            said = f'FileNotFoundError: {path} is there for 1 of 2 processes: the work folder, and a checkpoint that'
            assert output(tmp_path, rank).count(said) == count


def test_load_or_resume__checkpoints_that_cannot_be_used_are_not_written_over(tmp_path):
    hook = dict(type='CheckpointHook', interval=6, by_epoch=False, save_optimizer=False)
    settings = dict(default_hooks=dict(checkpoint=hook))
    assert run(tmp_path, 2, **settings) == [0, 0], output(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.pth')}
    assert sorted(before) == ['iter_12.pth', 'iter_6.pth']
    assert run(tmp_path, 2, **settings) == [1, 1]
    for rank in (0, 1):
        text = output(tmp_path, rank)
        assert f'ValueError: no run can go on from what {tmp_path} has:' in text
        assert f'{tmp_path}/iter_12.pth has no state of the optimizer' in text
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.pth')} == before


@pytest.mark.parametrize('message, lost', [
    ("teacher 'clip': cannot download http://x/w.pth (<urlopen error [Errno 111] Connection refused>)", False),
    ('[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:4711', True),
    ('[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv', True)])
def test_train__only_what_gloo_says_is_of_another_process(message, lost, tmp_path, monkeypatch):
    def fails(runner):
        raise RuntimeError(message)

    runner = build(tmp_path)
    monkeypatch.setattr(Runner, 'train', fails)
    monkeypatch.setattr(runner, '_world_size', 8)
    with pytest.raises(RuntimeError) as raised:
        runner.train()
    assert ('process 0 of 8 has lost another one' in str(raised.value)) == lost
    assert lost or str(raised.value) == message
