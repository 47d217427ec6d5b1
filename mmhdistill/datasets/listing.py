"""Folders of images as they are found, with whatever else lies in them."""
import errno
import os
import re
from collections.abc import Iterable
from typing import NamedTuple


class Listing(NamedTuple):
    """What lies in a folder.

    Attributes:
        names: image files, relative to the folder, sorted.
        problems: (class, path, what the system says) of what could not be listed: ``unreadable`` or ``symlink loop``.
    """
    names: list[str]
    problems: list[tuple[str, str, str]]


def list_images(folder: str, extensions: Iterable[str]) -> Listing:
    """Files below ``folder`` whose names end in one of ``extensions``, in whatever case.

    Links are followed, but not into a folder that the link lies in. Names that begin with a dot are left out [choice]:
    operating systems and notebooks put copies there that are no images. Only files are listed, no pipes or devices; a
    link to nothing is a problem. Names that are not UTF-8 are listed as Python has them and can be opened;
    :func:`printable` makes them fit to be shown.

    Raises:
        OSError: ``folder`` itself cannot be read.
    """
    endings = tuple(ending.lower() for ending in extensions)
    names, problems = [], []
    waiting = [('', frozenset())]
    while waiting:
        name, around = waiting.pop()
        path = os.path.join(folder, name)
        try:
            with os.scandir(path) as found:
                entries = list(found)
            status = os.stat(path)
        except OSError as error:
            if not name:
                raise
            problems.append(('unreadable', path, str(error)))
            continue
        around |= {(status.st_dev, status.st_ino)}
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            inner = os.path.join(name, entry.name)
            problem = _problem(entry, around, endings)
            if problem is not None:
                problems.append((problem[0], os.path.join(folder, inner), problem[1]))
            elif entry.is_dir():
                waiting.append((inner, around))
            elif entry.name.lower().endswith(endings):
                names.append(inner)
    return Listing(sorted(names), sorted(problems))


def list_folders(folder: str) -> list[str]:
    """Names of the folders in ``folder``, sorted, without hidden ones and links back to it."""
    status = os.stat(folder)
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith('.') and entry.is_dir()
                      and not _is_one_of(entry, {(status.st_dev, status.st_ino)}))


def printable(path: str) -> str:
    r"""``path`` with control characters and bytes that are not UTF-8 as ``\xNN``: any terminal or log takes it."""
    text = os.fsencode(path).decode('utf-8', 'backslashreplace')
    return re.sub(r'[\x00-\x1f\x7f]', lambda found: f'\\x{ord(found[0]):02x}', text)


def _problem(entry: os.DirEntry, around: frozenset[tuple[int, int]], endings: tuple[str, ...]
             ) -> tuple[str, str] | None:
    try:
        if entry.is_dir():
            looped = _is_one_of(entry, around)
            return ('symlink loop', f'it links to {os.path.realpath(entry.path)}') if looped else None
        if entry.is_file() or not entry.name.lower().endswith(endings):
            return None
        entry.stat()
    except OSError as error:
        return ('symlink loop' if error.errno == errno.ELOOP else 'unreadable'), str(error)
    return 'unreadable', 'neither a file nor a folder'


def _is_one_of(entry: os.DirEntry, folders: Iterable[tuple[int, int]]) -> bool:
    status = entry.stat()
    return (status.st_dev, status.st_ino) in folders
