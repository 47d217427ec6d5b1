"""Resuming on a GPU: what is exact there. Weights agree up to kernels that add up in no fixed order."""
import json
import signal
from functools import partial

import pytest
import torch
from mmengine.hooks import Hook

from tests.engine.resumable import ITERS, Act, last, output, run, signal_self

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
# At this scale no gradient is infinite, so it doubles after every eighth step.
WRAPPER = dict(type='AmpOptimWrapper', dtype='float16', loss_scale=dict(init_scale=2.0, growth_interval=8),
               optimizer=dict(type='AdamW', lr=1e-3), clip_grad=dict(max_norm=1.0))


class Drawn(Hook):
    """Writes down a number that the GPU draws after each iteration."""

    def __init__(self, folder):
        self.folder = folder

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with (self.folder / 'drawn.jsonl').open('a') as file:
            file.write(json.dumps([runner.iter, float(torch.rand((), device='cuda'))]) + '\n')


def test_kill__loss_scale_and_random_numbers_go_on(tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    settings = dict(optim_wrapper=WRAPPER, start='spawn')
    assert run(whole, hooks=(Drawn(whole), ), **settings) == [0], output(whole)
    kill = Act(partial(signal_self, signal.SIGKILL), 7)
    assert run(cut, hooks=(Drawn(cut), kill), **settings) == [-signal.SIGKILL], output(cut)
    # Six steps of the eight: one that began anew would double late.
    assert last(cut)['optimizer']['loss_scaler']['_growth_tracker'] == 6
    assert run(cut, hooks=(Drawn(cut), ), **settings) == [0], output(cut)
    for folder in (whole, cut):
        scaler = last(folder)['optimizer']['loss_scaler']
        assert (scaler['scale'], scaler['_growth_tracker']) == (8.0, ITERS - 16)
    numbers, again = ([tuple(json.loads(line)) for line in (folder / 'drawn.jsonl').read_text().splitlines()]
                      for folder in (whole, cut))
    assert [iteration for iteration, _ in numbers] == list(range(ITERS))
    assert len({x for _, x in numbers}) == ITERS
    assert [iteration for iteration, _ in again] == [*range(7), *range(6, ITERS)]
    assert set(again) == set(numbers)
    one, two = (torch.cat([x.flatten().float().cpu() for x in last(folder)['state_dict'].values()])
                for folder in (whole, cut))
    assert float((one - two).abs().sum() / one.abs().sum()) < 0.01
