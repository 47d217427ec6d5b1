import contextlib
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mmhdistill.engine.checkpoints import (
    AtomicBackend,
    DamagedCheckpoint,
    digest_file,
    find_checkpoint,
    remove_checkpoint,
    remove_leftovers,
    verify,
    write_atomically,
    write_checkpoint,
)
from tests.helpers import Payload, log_messages


class Killed(BaseException):
    """In place of SIGKILL: nothing that catches errors catches it."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save(path, iterations, **content):
    """A checkpoint that a run can go on from, written as runs write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = path.with_suffix('.buffer')
    torch.save(dict(meta=dict(iter=iterations), optimizer={}, **content), buffer)
    write_checkpoint(path, buffer.read_bytes())
    buffer.unlink()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_write_checkpoint__digest_of_sha256sum(tmp_path):
    path = tmp_path / 'a.pth'
    write_checkpoint(path, b'content')
    assert path.read_bytes() == b'content'
    assert digest_file(path).read_text() == f'{hashlib.sha256(b"content").hexdigest()}  a.pth\n'
    subprocess.run(['sha256sum', '-c', 'a.pth.sha256'], cwd=tmp_path, check=True, capture_output=True)
    assert names(tmp_path) == ['a.pth', 'a.pth.sha256']


@pytest.mark.parametrize('call', ['open', 'fsync', 'replace', 'unlink'])
def test_write_checkpoint__killed_anywhere_over_an_old_one(call, tmp_path, monkeypatch):
    """The old one or the new one is there, and never beside the digest of the other."""
    path, seen = tmp_path / 'a.pth', set()
    owner = Path if call in ('open', 'unlink') else os
    real = getattr(owner, call)
    for nth in range(1, 9):
        remove_checkpoint(path)
        write_checkpoint(path, b'old')
        left = [nth]

        def dying(*args, **kwargs):
            left[0] -= 1  # noqa: B023
            if left[0] <= 0:  # noqa: B023
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Killed) if nth < 2 else contextlib.suppress(Killed):
            patch.setattr(owner, call, dying)
            write_checkpoint(path, b'new')
        seen.add(path.read_bytes())
        with log_messages() as messages:
            verified = verify(path)
        assert verified or 'is unverified' in messages[0]
        remove_leftovers(tmp_path)
        assert not [name for name in names(tmp_path) if 'partial' in name]
    assert seen == {b'old', b'new'}


@pytest.mark.parametrize('write', [write_atomically, write_checkpoint])
def test_write__disk_full_leaves_the_old_one_and_nothing_else(write, tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    write(path, b'old')
    before = names(tmp_path)

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        write(path, b'new')
    assert path.read_bytes() == b'old' and names(tmp_path) == before


def test_write__reaches_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    calls = []
    for call in ('fsync', 'replace'):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *args, call=call, real=real: calls.append(call) or real(*args))
    write_atomically(tmp_path / 'a', b'1')
    assert calls == ['fsync', 'replace', 'fsync']


def test_atomic_backend__is_what_mmengine_finds_by_its_name(tmp_path):
    from mmengine.runner import save_checkpoint
    path = tmp_path / 'new/a.pth'
    save_checkpoint(dict(a=torch.ones(2)), str(path), backend_args=dict(backend=AtomicBackend.name))
    assert verify(path) is True
    assert torch.load(path, weights_only=True)['a'].tolist() == [1, 1]


def test_verify__damaged_and_unverified(tmp_path):
    path = tmp_path / 'a.pth'
    write_checkpoint(path, b'content')
    with log_messages() as messages:
        assert verify(path) is True
    assert messages == []
    damage(path)
    digest = hashlib.sha256(b'content').hexdigest()
    message = (rf'{path} has the sha256 [0-9a-f]{{64}}, and a.pth.sha256 says {digest}: it is'
               rf' not what was written. .* remove {digest_file(path)}.')
    with pytest.raises(DamagedCheckpoint, match=message):
        verify(path)
    digest_file(path).write_text('')
    with pytest.raises(DamagedCheckpoint, match='says nothing'):
        verify(path)
    digest_file(path).unlink()
    with log_messages() as messages:
        assert verify(path) is False
    assert messages == [f'{path} is unverified: no a.pth.sha256 lies beside it, which would tell whether it is whole']


def test_find_checkpoint__none(tmp_path):
    assert find_checkpoint(tmp_path) is None


def test_find_checkpoint__named_by_the_pointer_even_if_there_is_a_newer_one(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / f'iter_{number}.pth', number)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    assert find_checkpoint(tmp_path) == str(tmp_path / 'iter_2.pth')


def test_find_checkpoint__of_a_moved_folder_and_of_one_elsewhere(tmp_path):
    (tmp_path / 'run').mkdir()
    save(tmp_path / 'run/iter_1.pth', 1)
    save(tmp_path / 'elsewhere.pth', 2)
    (tmp_path / 'run/last_checkpoint').write_text('/old/place/iter_1.pth')
    assert find_checkpoint(tmp_path / 'run') == str(tmp_path / 'run/iter_1.pth')
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'elsewhere.pth'))
    assert find_checkpoint(tmp_path / 'run') == str(tmp_path / 'elsewhere.pth')


def test_find_checkpoint__of_a_copied_folder(tmp_path):
    save(tmp_path / 'run/iter_1.pth', 1)
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'run/iter_1.pth'))
    shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    save(tmp_path / 'run/iter_2.pth', 2)
    assert find_checkpoint(tmp_path / 'copy') == str(tmp_path / 'copy/iter_1.pth')
    damage(tmp_path / 'copy/iter_1.pth')
    with pytest.raises(ValueError, match=f'no run can go on from what {tmp_path}/copy has:\n  {tmp_path}/copy/iter_1'):
        find_checkpoint(tmp_path / 'copy')


def test_find_checkpoint__of_a_hook_with_another_folder(tmp_path):
    """There too the one before a damaged one is used; a stale one of the work folder that has its name never is."""
    for number in (3, 6):
        save(tmp_path / f'out/run/iter_{number}.pth', number)
    save(tmp_path / 'run/iter_6.pth', 6, stale=True)
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'out/run/iter_6.pth'))
    assert find_checkpoint(tmp_path / 'run') == str(tmp_path / 'out/run/iter_6.pth')
    damage(tmp_path / 'out/run/iter_6.pth')
    with log_messages() as messages:
        assert find_checkpoint(tmp_path / 'run') == str(tmp_path / 'out/run/iter_3.pth')
    assert 'iter_6.pth has the sha256' in messages[-1] and messages[-1].endswith('the checkpoint before it is used.')


def test_find_checkpoint__what_has_an_address_is_taken_as_it_is(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/run/iter_6.pth\n')
    assert find_checkpoint(tmp_path) == 's3://bucket/run/iter_6.pth'


def test_find_checkpoint__none_that_a_run_can_go_on_from(tmp_path):
    """Beginning anew would write over them."""
    save(tmp_path / 'damaged.pth', 1)
    damage(tmp_path / 'damaged.pth')
    torch.save(dict(meta=dict(iter=2)), tmp_path / 'weights.pth')
    torch.save(dict(meta=dict(iter=3), optimizer={}, extra=Payload(tmp_path / 'ran')), tmp_path / 'refused.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'gone.pth'))
    with pytest.raises(ValueError, match=f'no run can go on from what {tmp_path} has:\n') as error:
        find_checkpoint(tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert lines[0] == f'  {tmp_path}/last_checkpoint names {tmp_path}/gone.pth, which does not exist.'
    assert lines[1].startswith(f'  {tmp_path}/damaged.pth has the sha256 ')
    assert lines[2].startswith(f'  {tmp_path}/refused.pth cannot be read (it asks for ')
    assert lines[3] == f'  {tmp_path}/weights.pth has no state of the optimizer (save_optimizer=False, or a best one).'
    assert lines[4].startswith('Name a checkpoint that is whole, --resume FILE; or begin anew') and len(lines) == 5
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('pointer', [None, '', '/gone/iter_9.pth', 'iter_10.pth'])
def test_find_checkpoint__the_most_iterations_of_those_that_are_whole(pointer, tmp_path):
    for number in (2, 9, 10):
        save(tmp_path / f'iter_{number}.pth', number)
    save(tmp_path / 'interrupted.pth', 7)
    (tmp_path / 'best_knn.pth').write_bytes(b'')
    torch.save(dict(meta=dict(iter=99)), tmp_path / 'best_acc.pth')  # no run can go on from it
    damage(tmp_path / 'iter_10.pth')
    if pointer is not None:
        (tmp_path / 'last_checkpoint').write_text(pointer)
    (tmp_path / 'iter_9.pth').unlink()
    with log_messages() as messages:
        assert find_checkpoint(tmp_path) == str(tmp_path / 'interrupted.pth')
    text = '\n'.join(messages)
    assert f'{tmp_path}/iter_10.pth has the sha256 ' in text and f'{tmp_path}/best_knn.pth cannot be read (' in text
    assert f'{tmp_path}/best_acc.pth has no state of the optimizer' in text
    assert text.count('Skipped: the checkpoint before it is used.') == 3 + (pointer == '/gone/iter_9.pth')


def test_find_checkpoint__without_a_digest_a_broken_archive_is_skipped_too(tmp_path):
    save(tmp_path / 'iter_1.pth', 1)
    save(tmp_path / 'iter_2.pth', 2)
    content = (tmp_path / 'iter_2.pth').read_bytes()
    (tmp_path / 'iter_2.pth').write_bytes(content[:len(content) // 2])
    digest_file(tmp_path / 'iter_2.pth').unlink()
    with log_messages() as messages:
        assert find_checkpoint(tmp_path) == str(tmp_path / 'iter_1.pth')
    assert any('iter_2.pth cannot be read (' in message for message in messages)


def test_remove_leftovers__keeps_what_is_whole(tmp_path):
    save(tmp_path / 'a.pth', 1)
    for name in ('b.pth.partial', 'b.pth.sha256.partial', 'last_checkpoint.partial', 'c.pth.sha256'):
        (tmp_path / name).touch()
    (tmp_path / 'notes.sha256').touch()
    assert len(remove_leftovers(tmp_path)) == 4
    assert names(tmp_path) == ['a.pth', 'a.pth.sha256', 'notes.sha256']
    assert remove_leftovers(tmp_path) == []
