"""What signals do that come while a run is already stopping."""
import os
import signal
import time
from functools import partial

import pytest
from torch.utils.data import Sampler

from tests.engine.resumable import Act, Images, last, output, run


def signals_to_self(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize('numbers', [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM, signal.SIGINT)])
def test_second_ctrl_c__ends_at_once(numbers, tmp_path):
    act = Act(partial(signals_to_self, *numbers), 4, 'before_train_iter')
    assert run(tmp_path, hooks=(act, )) == [1]
    assert output(tmp_path).rstrip().endswith('KeyboardInterrupt')
    assert last(tmp_path)['meta']['iter'] == 3 and not (tmp_path / 'interrupted.pth').exists()


@pytest.mark.parametrize('numbers, code', [
    ((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGINT, signal.SIGTERM), 143), ((signal.SIGINT, ), 130)])
def test_other_signals__wait_for_the_checkpoint(numbers, code, tmp_path):
    act = Act(partial(signals_to_self, *numbers), 4, 'before_train_iter')
    assert run(tmp_path, hooks=(act, )) == [code], output(tmp_path)
    assert last(tmp_path)['meta']['iter'] == 5 and (tmp_path / 'interrupted.pth').exists()


class Broken(Sampler):

    def __init__(self, *args, **kwargs):
        pass

    def __len__(self):
        return 14

    def __iter__(self):
        raise TypeError('broken sampler')


def slow_forks(rank):
    os.register_at_fork(after_in_child=partial(time.sleep, 1))


def test_workers__are_ended_while_they_start(tmp_path):
    """Where they still have the handler of the process that they come from."""
    data = dict(batch_size=2, num_workers=2, dataset=Images(), sampler=dict(type=Broken))
    assert run(tmp_path, before=slow_forks, kill_after=60, train_dataloader=data) == [1]
    assert 'TypeError: broken sampler' in output(tmp_path)
