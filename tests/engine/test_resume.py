"""Runs that are killed and resumed end with the same bits as the run that was not."""
import itertools
import json
import os
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.engine.resumable import EPOCHS, IMAGES, ITERS, Act, assert_same_end, last, output, run, signal_self

KILL, TERM = partial(signal_self, signal.SIGKILL), partial(signal_self, signal.SIGTERM)
VARIANTS = dict(
    plain=dict(), workers=dict(workers=2), amp=dict(amp=True), iterations=dict(iters=True, workers=2),
    two=dict(world_size=2, workers=2, amp=True))
MATRIX = {
    **{f'{processes}-processes-{workers}-workers-{numbers}':
       dict(world_size=processes, workers=workers, amp=numbers == 'bfloat16')
       for processes, workers, numbers in itertools.product((1, 2), (0, 2), ('float32', 'bfloat16'))},
    'iterations': VARIANTS['iterations']}
# Of a checkpoint's write: its file, the digest, their folder, the pointer, its folder.
WRITE_CALLS = [(call, nth) for call, number in (('fsync', 5), ('replace', 3)) for nth in range(1, number + 1)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Folder of the uninterrupted run of a variant."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            assert set(run(done[name], **VARIANTS[name])) == {0}, output(done[name])
        return done[name]

    return get


@pytest.mark.parametrize('name', VARIANTS)
def test_kill__at_a_random_iteration(name, tmp_path, whole):
    iters = last(whole(name))['meta']['iter']
    assert iters == (12 if name == 'two' else ITERS)  # the seven images of a process make three batches and a half
    rng = random.Random(name)
    act = Act(KILL, rng.randrange(4, iters), rng.choice(['before_train_iter', 'after_train_iter']))
    codes = run(tmp_path, hooks=(act, ), **VARIANTS[name])
    assert codes[0] == -signal.SIGKILL and len(codes) == VARIANTS[name].get('world_size', 1)
    assert set(run(tmp_path, **VARIANTS[name])) == {0}, output(tmp_path)
    assert_same_end(tmp_path, whole(name))


def test_workers__do_not_change_what_is_trained(whole):
    assert_same_end(whole('plain'), whole('workers'))


def test_runs__draw_random_numbers(whole, tmp_path):
    """What the other tests rest on: another seed ends elsewhere."""
    assert run(tmp_path, randomness=dict(seed=4)) == [0]
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path, whole('plain'))


def _kill_in_write(nth, call, rank=0):
    """Kills the process at the nth call of os.fsync or os.replace from now on, with half of a file on disk."""
    real, count = getattr(os, call), [0]

    def counted(*args):
        count[0] += 1
        if count[0] == nth:
            KILL()
        return real(*args)

    setattr(os, call, counted)


# A checkpoint is two files and the pointer: five calls of fsync (each file, the folder; pointer, folder), three of
# replace. The manifest before is two and one.
@pytest.mark.parametrize('call, nth', [('fsync', 3), ('replace', 2), ('replace', 3), ('fsync', 9), ('replace', 6),
                                       ('replace', 7)])
def test_kill__inside_a_checkpoint_write(call, nth, tmp_path, whole):
    assert run(tmp_path, before=partial(_kill_in_write, nth, call)) == [-signal.SIGKILL]
    first = nth <= 4
    assert (tmp_path / 'iter_3.pth').exists() is not (first and call == 'fsync' or (call, nth) == ('replace', 2))
    assert run(tmp_path) == [0]
    assert_same_end(tmp_path, whole('plain'))


# The second checkpoint of a run that keeps one: before its file has its name, before the pointer names it, and before
# the outdated one is removed.
@pytest.mark.parametrize('call, nth, names, newest', [
    ('fsync', 8, ['iter_3.pth'], 3), ('replace', 7, ['iter_3.pth', 'iter_6.pth'], 3),
    ('fsync', 12, ['iter_3.pth', 'iter_6.pth'], 6)])
def test_kill__never_leaves_a_run_without_a_checkpoint(call, nth, names, newest, tmp_path):
    keep = dict(default_hooks=dict(
        checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False, max_keep_ckpts=1)))
    assert run(tmp_path, before=partial(_kill_in_write, nth, call), **keep) == [-signal.SIGKILL]
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == names
    assert last(tmp_path)['meta']['iter'] == newest
    (tmp_path / 'of_an_earlier_kill.pth.partial').touch()
    assert run(tmp_path, **keep) == [0]
    assert sorted(path.name for path in tmp_path.glob('*.pth*')) == [f'iter_{ITERS}.pth', f'iter_{ITERS}.pth.sha256']
    assert list(tmp_path.glob('*.partial')) == []


def test_load_checkpoint__a_damaged_one_that_is_asked_for_is_refused(tmp_path, whole):
    path = tmp_path / 'damaged.pth'
    original = whole('plain') / f'iter_{ITERS}.pth'
    path.write_bytes(original.read_bytes()[:-1])
    Path(f'{path}.sha256').write_text(Path(f'{original}.sha256').read_text())
    assert run(tmp_path / 'run', load_from=str(path)) == [1]
    assert f'DamagedCheckpoint: {path} has the sha256' in output(tmp_path / 'run')


@pytest.mark.parametrize('name', ['plain', 'iterations', 'two'])
@pytest.mark.parametrize('iteration', [4, 6])
def test_signal__one_checkpoint_and_the_code(name, iteration, tmp_path, whole):
    """In the middle of an epoch, and in its last iteration (of one process)."""
    codes = run(tmp_path, hooks=(Act(TERM, iteration), ), **VARIANTS[name])
    assert set(codes) == {128 + signal.SIGTERM}, output(tmp_path)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'interrupted.pth')
    assert last(tmp_path)['meta']['iter'] == iteration + 1
    assert f'after iteration {iteration + 1}; go on with --resume' in output(tmp_path)
    assert set(run(tmp_path, **VARIANTS[name])) == {0}, output(tmp_path)
    assert_same_end(tmp_path, whole(name))


def test_signal__of_one_process_stops_all(tmp_path, whole):
    act = Act(partial(signal_self, signal.SIGINT), 5, rank=1)
    assert run(tmp_path, hooks=(act, ), **VARIANTS['two']) == [128 + signal.SIGINT] * 2
    assert last(tmp_path)['meta']['iter'] == 6


def test_signal__to_all_processes_of_the_group_leaves_workers_alone(tmp_path, whole):
    def signal_children():
        # By a third process, as a launcher or a cluster does.
        children = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()
        subprocess.run(['kill', '-TERM', *children, str(os.getpid())], check=True)

    # Two batches are loaded ahead: the workers are needed after the signal.
    codes = run(tmp_path, hooks=(Act(signal_children, 4, 'before_train_iter'), ), workers=2)
    assert codes == [128 + signal.SIGTERM], output(tmp_path)
    assert run(tmp_path, workers=2) == [0]
    assert_same_end(tmp_path, whole('workers'))


def test_signal__waits_for_the_update_of_accumulated_gradients(tmp_path):
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3), accumulative_counts=3)
    assert run(tmp_path / 'whole', optim_wrapper=wrapper) == [0]
    assert run(tmp_path / 'cut', optim_wrapper=wrapper, hooks=(Act(TERM, 6), )) == [128 + signal.SIGTERM]
    assert last(tmp_path / 'cut')['meta']['iter'] == 9
    assert run(tmp_path / 'cut', optim_wrapper=wrapper) == [0]
    assert_same_end(tmp_path / 'cut', tmp_path / 'whole')


def test_one_of_two_dies__the_other_ends_with_a_message(tmp_path, whole):
    start = time.monotonic()
    codes = run(tmp_path, hooks=(Act(KILL, 4, rank=1), ), **VARIANTS['two'])
    assert time.monotonic() - start < 60
    assert codes == [1, -signal.SIGKILL]
    assert 'process 0 of 2 has lost another one' in output(tmp_path)
    assert set(run(tmp_path, **VARIANTS['two'])) == {0}, output(tmp_path)
    assert_same_end(tmp_path, whole('two'))


def test_seek__another_number_of_batches_in_the_middle_of_an_epoch(tmp_path):
    assert run(tmp_path, hooks=(Act(TERM, 4), )) == [128 + signal.SIGTERM]
    loader = dict(batch_size=7, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True))
    from tests.engine.resumable import Images
    assert run(tmp_path, train_dataloader=dict(loader, dataset=Images())) == [1]
    assert 'written after 5 of the 7 batches of epoch 1, and an epoch now has 2: give as many' in output(tmp_path)


def test_damaged_newest__the_one_before_is_used(tmp_path, whole):
    assert run(tmp_path, hooks=(Act(KILL, 8, 'before_train_iter'), )) == [-signal.SIGKILL]
    newest = tmp_path / 'iter_6.pth'
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert run(tmp_path) == [0]
    text = output(tmp_path)
    assert f'{newest} has the sha256 ' in text and 'Skipped: the checkpoint before it is used.' in text
    assert_same_end(tmp_path, whole('plain'))


def test_moved_folder__goes_on_there(tmp_path, whole):
    old, new = tmp_path / 'old', tmp_path / 'new'
    assert run(old, hooks=(Act(TERM, 10), )) == [128 + signal.SIGTERM]
    old.rename(new)
    assert run(new) == [0]
    assert not old.exists()
    assert_same_end(new, whole('plain'))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of as many KiB as it is given."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(size):
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}k', 'tmpfs', str(folder)],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'mount is refused here: {done.stderr.strip()}')
        return folder

    yield mount
    subprocess.run(['umount', str(folder)], capture_output=True)


def test_disk_full__is_told_and_training_goes_on(tmp_path, whole, small_disk):
    size = (whole('plain') / f'iter_{ITERS}.pth').stat().st_size // 1024
    # One checkpoint and a half beside logs and other small files.
    folder = small_disk(size * 3 // 2 + 200)
    assert run(folder) == [0]
    text = output(folder)
    assert text.count('No space left on device') == ITERS // 3 - 1
    assert 'checkpoint iter_6.pth could not be written' in text
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'iter_3.pth')
    assert sorted(path.name for path in folder.glob('*.pth*')) == ['iter_3.pth', 'iter_3.pth.sha256']
    # With room again, the last good one is what the run goes on from.
    subprocess.run(['mount', '-o', f'remount,size={size * 4 + 400}k', str(folder)], check=True)
    assert run(folder) == [0]
    assert_same_end(folder, whole('plain'))


def test_epoch_checkpoints__of_a_killed_run(tmp_path):
    hooks = dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)))
    assert run(tmp_path / 'whole', **hooks) == [0]
    assert run(tmp_path / 'cut', **hooks, hooks=(Act(KILL, 16), )) == [-signal.SIGKILL]
    found = last(tmp_path / 'cut')['meta']
    assert (found['epoch'], found['iter'], found['batches_done'], found['batches_per_epoch']) == (2, 14, 0, 7)
    assert run(tmp_path / 'cut', **hooks) == [0]
    assert_same_end(tmp_path / 'cut', tmp_path / 'whole')
    assert sorted(path.name for path in (tmp_path / 'cut').glob('*.pth*')) == ['epoch_3.pth', 'epoch_3.pth.sha256']


def test_images_of_an_epoch__none_is_left_out_or_repeated_by_a_resume(tmp_path):
    class Noted(Act):

        def __init__(self):
            super().__init__(None, -1)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen = [round(float(image.mean()), 3) for image in data_batch['inputs']]
            with (folder / 'seen.jsonl').open('a') as file:
                file.write(json.dumps([runner.epoch, batch_idx, seen]) + '\n')

    found = []
    for folder, cut in ((tmp_path / 'whole', 99), (tmp_path / 'cut', 9)):
        run(folder, hooks=(Noted(), Act(TERM, cut)))
        assert run(folder, hooks=(Noted(), )) == [0]
        found.append([json.loads(line) for line in (folder / 'seen.jsonl').read_text().splitlines()])
    places = [[epoch, batch] for epoch in range(EPOCHS) for batch in range(IMAGES // 2)]
    assert [line[:2] for line in found[0]] == places
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize('name', MATRIX)
def test_ten_kills__at_random_points(name, tmp_path):
    """Each run goes on from what the one before has left. Kill i is in the i-th tenth of the iterations: three inside
    the write of a checkpoint, five before or after an iteration, two at any time, at the latest there."""
    whole, cut, rng = tmp_path / 'whole', tmp_path / 'cut', random.Random(name)
    settings = dict(MATRIX[name], default_hooks=dict(
        checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False, max_keep_ckpts=2)))
    start = time.monotonic()
    assert set(run(whole, **settings)) == {0}, output(whole)
    spent, iters, left = time.monotonic() - start, last(whole)['meta']['iter'], []
    points = rng.sample([*rng.sample(WRITE_CALLS, 3), *['iteration'] * 5, *['time'] * 2], 10)
    for i, point in enumerate(points):
        iteration = rng.randrange(iters * i // 10, iters * (i + 1) // 10)
        act = Act(KILL, iteration, rng.choice(['before_train_iter', 'after_train_iter']),
                  rank=rng.randrange(settings.get('world_size', 1)))
        if point in WRITE_CALLS:
            call, nth = point
            act = Act(partial(_kill_in_write, nth, call), iteration)
        codes = run(cut, hooks=(act, ), kill_after=rng.uniform(0, spent) if point == 'time' else None, **settings)
        assert -signal.SIGKILL in codes, (i, point, iteration, codes, output(cut))
        # To a name that is not written again: a start has to remove it.
        left += [path.rename(cut / f'kill-{i}-{path.name}') for path in cut.glob('*.partial')]
    assert left
    assert set(run(cut, **settings)) == {0}, output(cut)
    assert_same_end(cut, whole)
    assert {path.name for path in cut.glob('*.pth*')} == {path.name for path in whole.glob('*.pth*')}
    assert torch.isfinite(torch.cat([x.flatten().float() for x in last(cut)['state_dict'].values()])).all()
