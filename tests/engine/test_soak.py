"""Thousands of iterations of the real loop, with workers, checkpoints and skipped steps: nothing piles up."""
import gc
import json
import math
import os
from pathlib import Path

import pytest
from mmengine.hooks import Hook

from tests.engine.resumable import BATCH, Images, output, run

pytestmark = pytest.mark.slow
EPOCHS, ITERS = 12, 250  # of an epoch


class Many(Images):
    """One of the images is infinite in one place, so that one step of an epoch is skipped."""

    def __len__(self):
        return ITERS * BATCH

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == 5:
            sample['inputs'][0, 0, 0] = math.inf
        return sample


class Measure(Hook):
    """Writes down the resident memory of its process, in pages, and its open files, at the end of each epoch."""

    priority = 'LOWEST'

    def __init__(self, folder):
        self.folder = folder

    def after_train_epoch(self, runner):
        # What lies in reference cycles waits for Python to look.
        gc.collect()
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        with (self.folder / 'measured.jsonl').open('a') as file:
            file.write(json.dumps([runner.iter, pages, len(os.listdir('/proc/self/fd'))]) + '\n')


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc')
@pytest.mark.parametrize('persistent', [True, False])
def test_soak__memory_and_open_files_are_flat(persistent, tmp_path):
    codes = run(
        tmp_path, hooks=(Measure(tmp_path), ), train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=EPOCHS),
        train_dataloader=dict(batch_size=BATCH, num_workers=2, persistent_workers=persistent, dataset=Many(),
                              sampler=dict(type='DefaultSampler', shuffle=True)),
        param_scheduler=None, default_hooks=dict(
            logger=dict(type='LoggerHook', interval=10),
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2)))
    assert codes == [0], output(tmp_path)
    assert len(list((tmp_path / 'nonfinite').glob('*.json'))) == EPOCHS
    iterations, pages, files = zip(*map(json.loads, (tmp_path / 'measured.jsonl').read_text().splitlines()))
    assert list(iterations) == [ITERS * epoch for epoch in range(1, EPOCHS + 1)]
    # The last thousand of the three thousand.
    assert max(pages[8:]) <= 1.02 * pages[7], pages
    assert max(files[4:]) <= max(files[1:4]), files
