"""Fetching weight files: resumed when cut, whole or not at all, by one process at a time."""
import http.client
import json
import os
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from mmengine.logging import MMLogger
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .files import file_digest

_BLOCK = 1 << 20
_ATTEMPTS = 5
_PAUSE = 0.5  # seconds, doubled after each attempt that brought nothing
_TIMEOUT = 60


class Mismatch(Exception):
    """The hash of a file is not the published one."""


def cache_dir() -> Path:
    """``$MMHDISTILL_CACHE``, else torch hub's checkpoints folder."""
    return Path(os.environ.get('MMHDISTILL_CACHE') or Path(torch.hub.get_dir()) / 'checkpoints')


def check_digest(path: Path, sha256: str | None = None, md5: str | None = None) -> str:
    """The file's sha256; :class:`Mismatch` unless its hashes begin as published."""
    own = file_digest(path)
    for algorithm, published in (('sha256', sha256), ('md5', md5)):
        found = own if algorithm == 'sha256' or not published else file_digest(path, algorithm)
        if published and not found.startswith(published.lower()):
            raise Mismatch(f'has {algorithm} {found}, and {published} is expected: it is damaged, or another file')
    return own


def verify(path: Path, fetched: bool, sha256: str | None = None, md5: str | None = None) -> str:
    """The file's sha256; ValueError unless its hashes begin as expected."""
    try:
        return check_digest(path, sha256, md5)
    except Mismatch as error:
        cure = 'Delete it to fetch it again.' if fetched else 'Give the right file, or correct the hash.'
        raise ValueError(f'{path} {error}. {cure}') from error


def cached_name(url: str) -> str:
    """Name in the cache folder: the last part of the URL, behind the repository on the Hugging Face hub, where every
    file has the same name."""
    parts = urllib.parse.urlparse(url)
    path = parts.path.strip('/')
    if parts.scheme not in ('http', 'https') or path.rsplit('/', 1)[-1] in ('', '.', '..'):
        raise ValueError(f'{url} names no file to fetch: give the http(s) URL of a weight file, or a path.')
    hub = re.fullmatch(r'(.+)/resolve/[^/]+/(.+)', path)
    return path.rsplit('/', 1)[-1] if hub is None else '--'.join(f'{hub[1]}/{hub[2]}'.split('/'))


def fetch(url: str, sha256: str | None = None, md5: str | None = None) -> Path:
    """Local path of ``url``: from the cache folder, else downloaded into it.

    A download that was cut goes on where it stopped, in this call or a later one. The file appears under its name only
    when it is complete and its hash, where one is published, is right. Other processes wait meanwhile.

    Args:
        sha256, md5: beginning of the published hash.
    """
    path = cache_dir() / cached_name(url)
    try:
        if not path.exists():
            _fetch_alone(url, path, sha256, md5)
    except Mismatch as error:
        raise RuntimeError(f'the file at {url} {error}. It was not kept. Try again; if it stays so, its publisher has '
                           'changed it: fetch it by hand and give its path as checkpoint.') from error
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f'{url} cannot be fetched ({error}). Without a network, put the file there by hand as '
                           f'{path}, set MMHDISTILL_CACHE to the folder that holds {path.name}, or give the path '
                           'of a file of yours as checkpoint.') from error
    origin = _origin(path)
    if origin.exists() and origin.read_text() != url:
        raise ValueError(f'{path} was fetched from {origin.read_text()}, and not from {url}, whose file has the same '
                         f'name: move it away (with {origin.name}), or fetch the other by hand and give its path.')
    return path


def _fetch_alone(url: str, path: Path, sha256: str | None, md5: str | None) -> None:
    """Fetch, or wait for the process that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f'{path}.lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        MMLogger.get_current_instance().info(f'waiting for another process that fetches {path.name}')
        lock.acquire()
    try:
        if not path.exists():
            _fetch(url, path, sha256, md5)
    finally:
        lock.release()


def _fetch(url: str, path: Path, sha256: str | None, md5: str | None) -> None:
    MMLogger.get_current_instance().info(f'fetching {url} into {path.parent}')
    part = path.with_name(path.name + '.part')
    _download(url, part)
    try:
        check_digest(part, sha256, md5)
    except Mismatch:
        _forget(part)
        raise
    # A file without this note was put there by hand.
    _origin(path).write_text(url)
    os.replace(part, path)
    _forget(part)


def _origin(path: Path) -> Path:
    return path.with_name(path.name + '.url')


def _download(url: str, part: Path) -> None:
    """Into ``part``, going on where it ends; gives up after several attempts that brought nothing."""
    columns = TextColumn(part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    failures = 0
    with Progress(*columns) as progress:
        task = progress.add_task(part.stem, total=None)
        while True:
            before = _size(part)
            try:
                return _request(url, part, lambda done, total: progress.update(task, completed=done, total=total))
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise
                reason = error
            except (OSError, http.client.HTTPException) as error:
                reason = error
            failures = 0 if _size(part) > before else failures + 1
            offline = isinstance(getattr(reason, 'reason', None), (ConnectionRefusedError, socket.gaierror))
            if offline or failures == _ATTEMPTS:
                raise reason
            time.sleep(_PAUSE * 2**failures)


def _request(url: str, part: Path, report) -> None:
    """One request for what ``part`` lacks."""
    request = urllib.request.Request(url, headers={'User-Agent': 'mmhdistill'})
    start, version = _size(part), part.with_name(part.name + '.json')
    known = _read_version(version)
    if start and known.get('url') == url:
        request.add_header('Range', f'bytes={start}-')
        if known.get('version'):
            # Another version of the file comes whole.
            request.add_header('If-Range', known['version'])
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies behind what is there: complete, or of another file
            if error.headers.get('Content-Range') == f'bytes */{start}':
                return
            part.unlink()
            raise ConnectionError('the part that was there does not belong to this file') from error
        raise
    with response:
        goes_on = response.status == 206
        if goes_on and not response.headers.get('Content-Range', '').startswith(f'bytes {start}-'):
            part.unlink()
            raise ConnectionError('the server gave another part of the file than it was asked for')
        done = start if goes_on else 0
        length = response.headers.get('Content-Length')
        total = None if length is None else done + int(length)
        with open(part, 'ab' if goes_on else 'wb') as file:
            if not goes_on:
                # Only now that the part is empty: a process killed in between must not leave this beside older bytes.
                strong = response.headers.get('ETag', '')
                stamp = strong if strong and not strong.startswith('W/') else response.headers.get('Last-Modified')
                version.write_text(json.dumps(dict(url=url, version=stamp)))
            while block := response.read1(_BLOCK):
                file.write(block)
                done += len(block)
                report(done, total)
    if total is not None and done != total:
        raise ConnectionError(f'the connection was cut after {done} of {total} bytes')


def _read_version(version: Path) -> dict:
    """What was noted beside a part; nothing where it was cut itself, on a full disk for example."""
    try:
        known = json.loads(version.read_text())
        return known if isinstance(known, dict) else {}
    except (FileNotFoundError, ValueError):
        return {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(part: Path) -> None:
    for path in (part, part.with_name(part.name + '.json')):
        path.unlink(missing_ok=True)
