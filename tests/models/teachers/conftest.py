"""A file server on this machine, to fetch weights from."""
import functools
import http.server
import threading

import pytest


class _Handler(http.server.SimpleHTTPRequestHandler):

    def do_GET(self):
        self.server.requested.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        """Nothing on stderr."""


@pytest.fixture
def server(tmp_path):
    """Serves ``server.folder`` at ``server.url`` and lists what was asked for in ``server.requested``."""
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.folder, server.requested = folder, []
        server.url = f'http://127.0.0.1:{server.server_address[1]}'
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """``$MMHDISTILL_CACHE``, not made yet."""
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'
