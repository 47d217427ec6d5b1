"""Checkpoints that are whole or not there: written at once, with a digest that is looked at when they are read."""
import hashlib
import os
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import MMLogger

from ..compat import refusal

PARTIAL = '.partial'
_DIGEST = '.sha256'


class DamagedCheckpoint(ValueError):
    """A file that is not what was written."""


def write_atomically(path: Path, data: bytes) -> None:
    """``path`` has its old content or all of ``data``, whenever the process is killed or the power fails."""
    os.replace(_write_partial(path, data), path)
    _sync_folder(path.parent)


def write_checkpoint(path: Path, data: bytes) -> None:
    """:func:`write_atomically`, and ``<path>.sha256`` beside it in the format of ``sha256sum -c``.

    A kill between the two leaves a checkpoint without a digest, never one with a wrong digest.
    """
    partial = _write_partial(path, data)
    try:
        digest = _write_partial(digest_file(path), f'{hashlib.sha256(data).hexdigest()}  {path.name}\n'.encode())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    digest_file(path).unlink(missing_ok=True)
    os.replace(partial, path)
    os.replace(digest, digest_file(path))
    _sync_folder(path.parent)


def _write_partial(path: Path, data: bytes) -> Path:
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open('wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicBackend(LocalBackend):
    """mmengine's files on disk, with checkpoints by :func:`write_checkpoint`: ``backend_args=dict(backend=...)``."""

    name = 'mmhdistill_atomic'

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, obj)


register_backend(AtomicBackend.name, AtomicBackend, force=True)


def digest_file(path: Path) -> Path:
    return path.with_name(path.name + _DIGEST)


def verify(path: Path) -> bool:
    """Whether the digest of a checkpoint was there to verify it; False is said in the log.

    Raises:
        DamagedCheckpoint: the file has another digest.
    """
    if not digest_file(path).is_file():
        MMLogger.get_current_instance().warning(
            f'{path} is unverified: no {digest_file(path).name} lies beside it, which would tell whether it is whole')
        return False
    expected = digest_file(path).read_text().split()[:1]
    with path.open('rb') as file:
        found = _sha256(file)
    if expected != [found]:
        raise DamagedCheckpoint(
            f'{path} has the sha256 {found}, and {digest_file(path).name} says {"".join(expected) or "nothing"}: it is '
            'not what was written. Take another checkpoint, or copy it anew; if it was changed on purpose, remove '
            f'{digest_file(path)}.')
    return True


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def find_checkpoint(folder: Path) -> str | None:
    """What to go on from: the checkpoint that ``last_checkpoint`` names, else the one of most iterations that is whole.

    A folder that was moved or copied is understood, and one whose checkpoints lie in another folder; what has an
    address (``s3://``) is taken as it is. Checkpoints that no run can go on from are skipped with a warning.

    Returns:
        None where none was written yet.

    Raises:
        ValueError: there are checkpoints, and no run can go on from one of them.
    """
    pointer = folder / 'last_checkpoint'
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    if '://' in named:
        return named
    places, first, refused = [folder], [], {}
    if named:
        there = Path(named)
        # A folder with a pointer of its own is the one that this one is a copy of.
        if (len(there.parts) > 1 and there.parent.resolve() != folder.resolve()
                and not (there.parent / pointer.name).exists()):
            places.insert(0, there.parent)
        candidates = [*(place / there.name for place in places), there]
        first = [path for path in candidates if path.is_file()][:1]
        if not first:
            refused[pointer] = f'names {named}, which does not exist.'
    for paths in (first, *(sorted(place.glob('*.pth')) for place in places)):
        whole = {}
        for path in paths:
            if path not in refused:
                try:
                    whole[path] = _iterations(path)
                except ValueError as error:
                    refused[path] = str(error).removeprefix(f'{path} ')
        if whole:
            for path, what in refused.items():
                MMLogger.get_current_instance().warning(
                    f'{path} {what} Skipped: the checkpoint before it is used.')
            return str(max(whole, key=whole.get))
    if refused:
        lines = '\n'.join(f'  {path} {what}' for path, what in refused.items())
        raise ValueError(f'no run can go on from what {folder} has:\n{lines}\nName a checkpoint that is whole, '
                         '--resume FILE; or begin anew, in another work folder or without --resume.')
    return None


def _iterations(path: Path) -> int:
    """That a checkpoint was trained for.

    Raises:
        ValueError: no run can go on from it.
    """
    try:
        verify(path)
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        iterations = content['meta']['iter'] if 'optimizer' in content else None
    except DamagedCheckpoint:
        raise
    except Exception as error:  # whatever a broken archive leads to
        raise ValueError(f'{path} cannot be read ({refusal(error)}).') from error
    if iterations is None:
        raise ValueError(f'{path} has no state of the optimizer (save_optimizer=False, or a best one).')
    return iterations


def remove_checkpoint(path: Path) -> None:
    """With its digest; nothing if there is none."""
    path.unlink(missing_ok=True)
    digest_file(path).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Of writing that was killed: files that were not finished, digests of files that are gone. Returns them."""
    left = [*folder.glob(f'*{PARTIAL}')]
    left += [path for path in folder.glob(f'*.pth{_DIGEST}') if not path.with_name(path.name[:-len(_DIGEST)]).exists()]
    for path in left:
        path.unlink(missing_ok=True)
    return left
