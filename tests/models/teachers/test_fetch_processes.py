"""Several processes fetch at once, and some are killed."""
import hashlib
import logging.handlers
import multiprocessing
import os
import signal
import time

import pytest
from filelock import FileLock, Timeout
from mmengine.logging import MMLogger

from mmhdistill.models.teachers.fetch import fetch

from ...helpers import log_messages
from .conftest import SIZE, Answer
from .test_fetch import CUT, FIRST, assert_fetched

pytestmark = pytest.mark.usefixtures('pauses')
# Children take over the patches and the server's address; none of them touches torch.
FORK = multiprocessing.get_context('fork')


def work(url, queue, **published):
    """In a child: its log and the file's hash go to the parent."""
    logger = MMLogger.get_instance(f'child-{os.getpid()}')
    logger.handlers = [logging.handlers.QueueHandler(queue)]
    logger.setLevel('INFO')
    fetch(url, **published)
    queue.close()
    queue.join_thread()


@pytest.fixture
def children():
    """Starts processes that fetch, and ends those that are left."""
    started = []

    def start(url, queue, **published):
        started.append(FORK.Process(target=work, args=(url, queue), kwargs=published))
        started[-1].start()
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.join()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize('number', [2, 4])
def test_fetch__processes_at_once_fetch_once(number, server, cache, weights, children):
    url, queue = f'{server.url}/w.pth', FORK.Queue()
    server.holds = [CUT]
    started = [children(url, queue, sha256=hashlib.sha256(weights).hexdigest()) for _ in range(number)]
    # The file goes on only when all of them are known to be at it.
    said = sorted(queue.get(timeout=30).getMessage() for _ in range(number))
    assert said == [f'fetching {url} into {cache}'] + (number - 1) * ['waiting for another process that fetches w.pth']
    assert not (cache / 'w.pth').exists()
    server.go_on.set()
    for child in started:
        child.join(30)
    assert [child.exitcode for child in started] == number * [0]
    assert server.answers == [Answer(200, 0, SIZE)]
    assert_fetched(cache, weights)


@pytest.fixture
def killed(server, cache, weights, children):
    """A process was killed in the middle of a download; the number of bytes that it left."""
    def size():
        return part.stat().st_size if part.exists() else 0

    server.holds, part = [CUT], cache / 'w.pth.part'
    child = children(f'{server.url}/w.pth', FORK.Queue())
    # Up to a block of the file object's own buffer is not on the disk yet.
    wait_for(lambda: size() > CUT - 8192)
    with pytest.raises(Timeout):
        FileLock(cache / 'w.pth.lock').acquire(timeout=0)
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert not (cache / 'w.pth').exists()
    return size()


def test_fetch__killed_process_leaves_its_lock_and_its_part(killed, server, cache, weights):
    with log_messages() as messages:
        fetch(f'{server.url}/w.pth')
    assert messages == [f'fetching {server.url}/w.pth into {cache}']
    assert server.answers == [FIRST, Answer(206, killed, SIZE - killed)]
    assert CUT - 8192 < killed <= CUT
    assert_fetched(cache, weights)


def test_fetch__waiting_process_goes_on_where_the_killed_one_stopped(server, cache, weights, children):
    url, queue, part = f'{server.url}/w.pth', FORK.Queue(), cache / 'w.pth.part'
    server.holds = [CUT]
    first = children(url, FORK.Queue())
    wait_for(lambda: part.exists() and part.stat().st_size > CUT - 8192)
    second = children(url, queue)
    assert queue.get(timeout=30).getMessage() == 'waiting for another process that fetches w.pth'
    kept = part.stat().st_size
    os.kill(first.pid, signal.SIGKILL)
    second.join(30)
    assert second.exitcode == 0
    assert server.answers == [FIRST, Answer(206, kept, SIZE - kept)]
    assert_fetched(cache, weights)


def test_fetch__name_appears_with_the_whole_file_only(server, cache, weights, children):
    server.pause = 0.02
    child = children(f'{server.url}/w.pth', FORK.Queue())
    parts, finals = set(), set()
    while child.is_alive():
        for name, sizes in (('w.pth', finals), ('w.pth.part', parts)):
            try:
                sizes.add((cache / name).stat().st_size)
            except FileNotFoundError:
                continue
        time.sleep(0.002)
    assert child.exitcode == 0
    # It was watched while it grew.
    assert len([size for size in parts if 0 < size < SIZE]) > 5
    assert finals <= {SIZE}
    assert_fetched(cache, weights)
