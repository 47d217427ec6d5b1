"""A file server on this machine, to fetch weights from; it cuts, holds and refuses when told, and counts its bytes."""
import email.utils
import hashlib
import http.server
import random
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

SIZE = 1_000_000
_BLOCK = 1 << 16


@dataclass
class Answer:
    """To one request for a file: the status, where in the file it began and how many of its bytes were given."""

    status: int
    start: int = 0
    given: int = 0


class _Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
        path = self.path.partition('?')[0]
        if path.startswith('/moved/'):
            self._reply(302, {'Location': path.removeprefix('/moved')})
            return
        self.server.requested.append(self.path)
        if status := self.server.refusals.pop(0) if self.server.refusals else 0:
            self._fail(status)
        elif not (file := self.server.folder / path.strip('/')).is_file():
            self._fail(404)
        else:
            self._serve(file)

    def do_HEAD(self):
        file = self.server.folder / self.path.strip('/')
        if file.is_file():
            self._reply(200, {'Content-Length': file.stat().st_size, **self._stamps(file)})
        else:
            self._reply(404, {'X-Error-Code': 'EntryNotFound'})

    def log_message(self, *args):
        """Nothing on stderr."""

    def _serve(self, file: Path):
        data, stamps, start = file.read_bytes(), self._stamps(file), 0
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked and self.server.ranges and self.headers.get('If-Range') in (None, *self._strong(stamps)):
            start = int(asked[1]) + self.server.shift
        if start >= len(data) > 0:
            self._fail(416, {'Content-Range': f'bytes */{len(data)}'})
            return
        headers = {'Content-Length': len(data) - start} if self.server.tells_length else {}
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        answer = Answer(206 if start else 200, start)
        self.server.answers.append(answer)
        self._reply(answer.status, {**headers, **stamps})
        end = start + self.server.cuts.pop(0) if self.server.cuts else len(data)
        hold = start + self.server.holds.pop(0) if self.server.holds else None
        data = data[:end]
        while start < len(data):
            stop = min(start + _BLOCK, len(data))
            if hold is not None and start <= hold < stop:
                stop = hold
            # Counted first: the client may be done before this thread goes on.
            answer.given += stop - start
            self.wfile.write(data[start:stop])
            start = stop
            if start == hold:
                self.server.go_on.wait(60)
                hold = None
            time.sleep(self.server.pause)

    def _stamps(self, file: Path) -> dict[str, str]:
        stamps = {'X-Repo-Commit': 40 * 'c'}
        if self.server.etag:
            stamps['ETag'] = self.server.etag.format(hashlib.md5(file.read_bytes()).hexdigest())
        if self.server.dated:
            stamps['Last-Modified'] = email.utils.formatdate(file.stat().st_mtime, usegmt=True)
        return stamps

    @staticmethod
    def _strong(stamps: dict[str, str]) -> list[str]:
        return [value for value in (stamps.get('ETag'), stamps.get('Last-Modified')) if value and value[:2] != 'W/']

    def _fail(self, status: int, headers: dict | None = None):
        self.server.answers.append(Answer(status))
        self._reply(status, {'Content-Length': 0, **(headers or {})})

    def _reply(self, status: int, headers: dict):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


class FileServer(http.server.ThreadingHTTPServer):
    """Serves ``folder`` at ``url``.

    Attributes:
        requested: the paths asked for.
        answers: an :class:`Answer` to each.
        refusals: statuses of the next answers in place of the file, which is given where one is 0.
        cuts: after how many bytes the next answers end.
        holds: after how many bytes the next answers wait for ``go_on``.
        pause: seconds between two blocks of 64 KiB.
        shift: how far behind the byte that was asked for the part begins that is given.
        ranges, tells_length: whether it knows Range and If-Range, and sends Content-Length.
        etag, dated: the ETag with the file's md5 in place of ``{}``, or None; whether Last-Modified is sent.
    """

    def __init__(self, folder: Path):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.folder, self.url = folder, f'http://127.0.0.1:{self.server_address[1]}'
        self.requested: list[str] = []
        self.answers: list[Answer] = []
        self.refusals: list[int] = []
        self.cuts: list[int] = []
        self.holds: list[int] = []
        self.go_on = threading.Event()
        self.pause = 0.0
        self.shift = 0
        self.ranges = self.tells_length = self.dated = True
        self.etag: str | None = '"{}"'

    def handle_error(self, request, client_address):
        """A client that was killed is no error."""


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / 'served'
    folder.mkdir()
    with FileServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """``$MMHDISTILL_CACHE``, not made yet."""
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def some_bytes(seed=0, size=SIZE):
    return random.Random(seed).randbytes(size)


@pytest.fixture
def weights(server):
    """A served file's bytes."""
    (server.folder / 'w.pth').write_bytes(some_bytes())
    return some_bytes()


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between attempts, noted in place of being waited for."""
    noted = []
    monkeypatch.setattr('mmhdistill.models.teachers.fetch.time', SimpleNamespace(sleep=noted.append))
    return noted
