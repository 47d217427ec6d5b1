"""Libraries that may be missing, and the Hugging Face hub, whose place a server on this machine takes."""
import multiprocessing
import os
import socket
import sys
import time

import pytest

from mmhdistill.models.teachers.optional import from_hub, require

COMMIT = 40 * 'c'
FORK = multiprocessing.get_context('fork')


def call(queue, environment, arguments):
    """In a child: from_hub as in a process that was started with ``environment``."""
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.partition('.')[0] == 'huggingface_hub']:
        del sys.modules[name]
    # The hub waits for 23 s between attempts.
    time.sleep = lambda seconds: None
    try:
        queue.put(str(from_hub(*arguments)))
    except Exception as error:
        queue.put((type(error).__name__, str(error)))
    queue.close()
    queue.join_thread()


@pytest.fixture
def hub(tmp_path):
    """Calls from_hub in a process of its own, since the hub's settings are read once: a path, or the error."""

    def run(*arguments, **environment):
        queue = FORK.Queue()
        environment = {'HF_HUB_CACHE': str(tmp_path / 'hub'), 'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_TELEMETRY': '1',
                       'HF_HUB_DISABLE_PROGRESS_BARS': '1', **environment}
        child = FORK.Process(target=call, args=(queue, environment, arguments))
        child.start()
        try:
            return queue.get(timeout=60)
        finally:
            child.kill()
            child.join()

    return run


def message(url, reason, tmp_path):
    return (f"w.bin of teacher 'mine' cannot be fetched from {url} ({reason}). Without a network, fetch w.bin "
            f"elsewhere and give its path; the hub keeps its files in {tmp_path / 'hub'}.")


UNREACHABLE = ('An error happened while trying to locate the file on the Hub and we cannot find the requested files in '
               'the local cache. Please check your connection and try again or make sure your Internet connection is '
               'on.')


@pytest.mark.parametrize('library, pinned', [('timm', 'timm'), ('transformers', 'transformers<=4.48.3'),
                                             ('huggingface_hub', 'huggingface_hub')])
def test_require__names_the_pip_line(library, pinned, monkeypatch):
    # Python's own sign for a module that must not be imported.
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError) as caught:
        require(library, 'SomeTeacher')
    assert str(caught.value) == (
        f'SomeTeacher needs {library}, which cannot be imported (import of {library} halted; None in sys.modules). '
        f"Run: pip install '{pinned}'")


def test_require__library_that_is_not_installed():
    with pytest.raises(ImportError, match=r"\(No module named 'no_such_one'\)\. Run: pip install 'no_such_one'"):
        require('no_such_one', 'SomeTeacher')


def test_require__library_that_fails_itself(monkeypatch, tmp_path):
    """The reason is told, since installing it again may not help."""
    (tmp_path / 'broken_library.py').write_text('import something_it_needs')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"cannot be imported \(No module named 'something_it_needs'\)"):
        require('broken_library', 'SomeTeacher')


def test_require__gives_the_module(monkeypatch, tmp_path):
    (tmp_path / 'some_library.py').write_text('answer = 42')
    monkeypatch.syspath_prepend(tmp_path)
    assert require('some_library', 'SomeTeacher').answer == 42


@pytest.mark.parametrize('repository, revision', [('some/model', 'main'), ('some/model@v2', 'v2')])
def test_from_hub__offline(repository, revision, hub, tmp_path):
    found = hub(repository, 'w.bin', 'mine', 'give its path', HF_HUB_OFFLINE='1', HF_ENDPOINT='https://huggingface.co')
    url = f'https://huggingface.co/some/model/resolve/{revision}/w.bin'
    assert found == ('RuntimeError', message(url, UNREACHABLE, tmp_path))


def test_from_hub__unreachable(hub, tmp_path):
    with socket.socket() as taken:
        # Bound, but it does not listen.
        taken.bind(('127.0.0.1', 0))
        endpoint = f'http://127.0.0.1:{taken.getsockname()[1]}'
        found = hub('some/model', 'w.bin', 'mine', 'give its path', HF_ENDPOINT=endpoint)
    assert found == ('RuntimeError', message(f'{endpoint}/some/model/resolve/main/w.bin', UNREACHABLE, tmp_path))


def test_from_hub__no_such_file(server, hub, tmp_path):
    kind, text = hub('some/model', 'w.bin', 'mine', 'give its path', HF_ENDPOINT=server.url)
    url = f'{server.url}/some/model/resolve/main/w.bin'
    assert kind == 'RuntimeError'
    before, after = message(url, '404 Client Error', tmp_path).split('404 Client Error')
    assert text.startswith(f'{before}404 Client Error')
    assert text.endswith(after)


@pytest.mark.parametrize('name', ['no/such/folder', './weights', '/no/folder'])
def test_from_hub__mistyped_folder(name, hub):
    kind, text = hub(name, 'w.bin', 'mine', 'give its path')
    assert kind == 'ValueError'
    assert text.startswith(f"teacher 'mine' asks for '{name}', which is neither a folder that exists nor a name on the "
                           'Hugging Face hub, such as facebook/dinov2-base (')


@pytest.mark.parametrize('repository, revision', [('some/model', 'main'), ('some/model@v2', 'v2')])
def test_from_hub__fetched_once_then_from_its_cache(repository, revision, server, hub, tmp_path):
    folder = server.folder / f'some/model/resolve/{revision}'
    folder.mkdir(parents=True)
    (folder / 'w.bin').write_bytes(bytes(range(256)) * 100)
    arguments = repository, 'w.bin', 'mine', 'give its path'
    expected = tmp_path / 'hub/models--some--model/snapshots' / COMMIT / 'w.bin'
    for offline in '001':
        assert hub(*arguments, HF_ENDPOINT=server.url, HF_HUB_OFFLINE=offline) == str(expected)
        assert expected.read_bytes() == bytes(range(256)) * 100
    assert server.requested == [f'/some/model/resolve/{revision}/w.bin']
    assert [answer.given for answer in server.answers] == [25600]
