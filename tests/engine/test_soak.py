"""Thousands of iterations of the quick start, with its worker, checkpoints and skipped steps: nothing piles up."""
import gc
import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS

from mmhdistill.compat import config_path
from mmhdistill.engine.launch import prepare
from tests.helpers import write_images

pytestmark = pytest.mark.slow
EPOCHS, ITERS, BATCH = 12, 250, 2  # ITERS of an epoch


class Measure(Hook):
    """Writes down the memory in KiB and the open files of its process and the workers together, at the last iteration
    of each epoch. One step of an epoch has an infinite loss, so it is skipped."""

    priority = 'LOWEST'

    def __init__(self, folder):
        self.folder = folder

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        runner.model.losses['feature'].loss_weight = math.inf if batch_idx == 5 else 1.0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx < ITERS - 1:
            return
        # What lies in reference cycles waits for Python to look.
        gc.collect()
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        measured = [runner.iter + 1, len(processes), sum(map(memory, processes)),
                    sum(len(os.listdir(f'/proc/{process}/fd')) for process in processes)]
        with (self.folder / 'measured.jsonl').open('a') as file:
            file.write(json.dumps(measured) + '\n')


def memory(process: int) -> int:
    """KiB that are its own, and its part of those that it shares: but of libraries' files, since how many processes
    share those changes with what else runs on the machine."""
    lines = Path(f'/proc/{process}/smaps_rollup').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(('Pss_Anon:', 'Pss_Shmem:')))


def quick_start(folder: Path, persistent: bool) -> None:
    cfg = Config.fromfile(config_path('mmhdistill::quickstart/hdistill_vit-photos.py'))
    cfg.merge_from_dict({
        'model.teachers.supervised.checkpoint': None, 'model.teachers.mae.checkpoint': None,
        'train_dataloader.dataset.data_root': str(folder / 'train'), 'train_dataloader.batch_size': BATCH,
        'train_dataloader.persistent_workers': persistent, 'train_cfg.max_epochs': EPOCHS,
        'default_hooks.checkpoint.interval': 1})
    prepare(cfg, 'none', str(folder))
    runner = RUNNERS.build(cfg)
    runner.register_hook(Measure(folder))
    runner.train()


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='reads /proc')
@pytest.mark.parametrize('persistent', [True, False])
def test_soak__memory_and_open_files_are_flat(persistent, tmp_path):
    write_images(tmp_path / 'train', [f'{label}/{i}.png' for label in 'ab' for i in range(ITERS * BATCH // 2)])
    # A process that has not seen the tests before.
    process = multiprocessing.get_context('spawn').Process(target=quick_start, args=(tmp_path, persistent))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(list((tmp_path / 'nonfinite').glob('*.json'))) == EPOCHS
    lines = (tmp_path / 'measured.jsonl').read_text()
    print(lines)
    iterations, processes, kilobytes, files = zip(*map(json.loads, lines.splitlines()))
    assert list(iterations) == [ITERS * epoch for epoch in range(1, EPOCHS + 1)]
    assert set(processes) == {2}  # of which one is the worker
    # The last thousand of the three thousand.
    assert max(kilobytes[8:]) <= 1.02 * kilobytes[7], kilobytes
    assert max(files[4:]) <= max(files[1:4]), files
