"""Fetching is checked by the bytes that the server gave: none twice, none lost, by one process at a time."""
import hashlib
import os
import re
import socket

import pytest

from mmhdistill.models.teachers.fetch import Mismatch, cache_dir, cached_name, check_digest, fetch, verify

from ...helpers import log_messages
from .conftest import SIZE, Answer, some_bytes

CUT = 300_000
FIRST, REST = Answer(200, 0, CUT), Answer(206, CUT, SIZE - CUT)
ATTEMPTS = 5


pytestmark = pytest.mark.usefixtures('pauses')


def interrupt(server, url):
    """A call that gets 300000 bytes, then no answer but 503 until it gives up."""
    server.cuts, server.refusals = [CUT], [0] + ATTEMPTS * [503]
    with pytest.raises(RuntimeError, match='503'):
        fetch(url)
    assert server.answers == [FIRST] + ATTEMPTS * [Answer(503)]
    server.answers.clear()


def files(cache):
    """What lies in the cache beside locks, of which filelock keeps some."""
    return sorted(file.name for file in cache.iterdir() if file.suffix not in ('.lock', '.url'))


def assert_fetched(cache, content, name='w.pth'):
    """The whole file under its name, and nothing else."""
    assert (cache / name).read_bytes() == content
    assert files(cache) == [name]


def sentence(url, reason, cache, name='w.pth'):
    return (f'{url} cannot be fetched ({reason}). Without a network, put the file there by hand as {cache / name}, set '
            f'MMHDISTILL_CACHE to the folder that holds {name}, or give the path of a file of yours as checkpoint.')


@pytest.mark.parametrize('url, name', [
    ('https://dl.fbaipublicfiles.com/dino/dino_vits16.pth', 'dino_vits16.pth'),
    ('https://zenodo.org/records/1/files/w.pth?download=1', 'w.pth'),
    ('https://huggingface.co/timm/vit_base/resolve/main/model.safetensors', 'timm--vit_base--model.safetensors'),
    ('https://huggingface.co/gpt2/resolve/607a30d/model.safetensors', 'gpt2--model.safetensors'),
    ('https://hf-mirror.com/a/b/resolve/main/open/clip.bin?download=true', 'a--b--open--clip.bin'),
    ('https://host/resolve/w.pth', 'w.pth'),
])
def test_cached_name(url, name):
    assert cached_name(url) == name


@pytest.mark.parametrize('url', [
    'https://host', 'https://host/', 'https://host/?file=w.pth', 'https://host/a/..', 'https://host/a/.',
    'https://host/a/resolve/main/..', 'ftp://host/w.pth', 'file:///w.pth', 's3://bucket/w.pth', '://w.pth'])
def test_fetch__url_that_names_no_file(url, cache):
    with pytest.raises(ValueError) as caught:
        fetch(url)
    assert str(caught.value) == (f'{url} names no file to fetch: give the http(s) URL of a weight file, or a path.')
    assert not cache.exists()


def test_cache_dir__variable_else_torch_hub(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('MMHDISTILL_CACHE', raising=False)
    assert cache_dir() == tmp_path / 'torch' / 'hub' / 'checkpoints'
    monkeypatch.setenv('MMHDISTILL_CACHE', '')
    assert cache_dir() == tmp_path / 'torch' / 'hub' / 'checkpoints'
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path / 'mine'))
    assert cache_dir() == tmp_path / 'mine'


@pytest.mark.parametrize('digits', [0, 8, 32])
def test_check_digest__beginning_of_the_published_hash(digits, tmp_path):
    path, content = tmp_path / 'w', some_bytes()
    path.write_bytes(content)
    own = hashlib.sha256(content).hexdigest()
    md5 = hashlib.md5(content).hexdigest()
    assert check_digest(path, own[:2 * digits], md5[:digits]) == own
    assert check_digest(path, md5=md5[:digits]) == own


@pytest.mark.parametrize('algorithm', ['sha256', 'md5'])
def test_check_digest__mismatch(algorithm, tmp_path):
    path = tmp_path / 'w'
    path.write_bytes(b'abc')
    right = {name: hashlib.new(name, b'abc').hexdigest() for name in ('sha256', 'md5')}
    with pytest.raises(Mismatch) as caught:
        check_digest(path, **{**right, algorithm: right[algorithm][1:9]})
    assert str(caught.value) == (
        f'has {algorithm} {right[algorithm]}, and {right[algorithm][1:9]} is expected: it is damaged, or another file')


@pytest.mark.parametrize('fetched, cure', [(True, 'Delete it to fetch it again.'),
                                           (False, 'Give the right file, or correct the hash.')])
def test_verify__cure_of_a_fetched_file_and_of_ones_own(fetched, cure, tmp_path):
    path = tmp_path / 'w'
    path.write_bytes(b'abc')
    right = hashlib.sha256(b'abc').hexdigest()
    assert verify(path, fetched) == verify(path, fetched, right[:8].upper(), '9001') == right
    with pytest.raises(ValueError) as caught:
        verify(path, fetched, right, '9000')
    assert str(caught.value) == (f'{path} has md5 900150983cd24fb0d6963f7d28e17f72, and 9000 is expected: it is '
                                 f'damaged, or another file. {cure}')


@pytest.mark.parametrize('digits', [None, 8, 64])
@pytest.mark.parametrize('algorithm', ['sha256', 'md5'])
def test_fetch__right_hash(algorithm, digits, server, cache, weights):
    published = hashlib.new(algorithm, weights).hexdigest()[:digits] if digits else None
    assert fetch(f'{server.url}/w.pth', **{algorithm: published}) == cache / 'w.pth'
    assert_fetched(cache, weights)
    assert server.answers == [Answer(200, 0, SIZE)]


@pytest.mark.parametrize('algorithm', ['sha256', 'md5'])
def test_fetch__wrong_hash_leaves_no_file(algorithm, server, cache, weights):
    url, found = f'{server.url}/w.pth', hashlib.new(algorithm, weights).hexdigest()
    with pytest.raises(RuntimeError) as caught:
        fetch(url, **{algorithm: 'deadbeef'})
    assert str(caught.value) == (
        f'the file at {url} has {algorithm} {found}, and deadbeef is expected: it is damaged, or another file. It was '
        'not kept. Try again; if it stays so, its publisher has changed it: fetch it by hand and give its path as '
        'checkpoint.')
    assert files(cache) == []
    # The damaged bytes are not resumed either.
    assert fetch(url, **{algorithm: found}).read_bytes() == weights
    assert server.answers == 2 * [Answer(200, 0, SIZE)]


def test_fetch__cached_file_is_not_fetched_again(server, cache, weights):
    with log_messages() as messages:
        for _ in range(2):
            assert fetch(f'{server.url}/w.pth').read_bytes() == weights
    assert server.requested == ['/w.pth']
    assert messages == [f'fetching {server.url}/w.pth into {cache}']


def test_fetch__file_put_there_by_hand_needs_no_network(cache):
    cache.mkdir()
    (cache / 'w.pth').write_bytes(b'mine')
    assert fetch('http://127.0.0.1:9/folder/w.pth').read_bytes() == b'mine'


def test_fetch__file_of_the_same_name_from_another_url_is_refused(server, cache, weights):
    (server.folder / 'other').mkdir()
    (server.folder / 'other' / 'w.pth').write_bytes(b'another')
    path, note = fetch(f'{server.url}/w.pth'), cache / 'w.pth.url'
    assert note.read_text() == f'{server.url}/w.pth'
    with pytest.raises(ValueError) as caught:
        fetch(f'{server.url}/other/w.pth')
    assert str(caught.value) == (
        f'{path} was fetched from {server.url}/w.pth, and not from {server.url}/other/w.pth, whose file has the same '
        'name: move it away (with w.pth.url), or fetch the other by hand and give its path.')
    assert path.read_bytes() == weights
    path.unlink()
    assert fetch(f'{server.url}/other/w.pth').read_bytes() == b'another'
    assert note.read_text() == f'{server.url}/other/w.pth'


def test_fetch__folder_that_cannot_be_written(server, tmp_path, monkeypatch, weights):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path / 'file' / 'cache'))
    with pytest.raises(RuntimeError, match=re.escape(f'{server.url}/w.pth cannot be fetched (')) as caught:
        fetch(f'{server.url}/w.pth')
    assert f'put the file there by hand as {tmp_path / "file" / "cache" / "w.pth"}' in str(caught.value)


def test_fetch__empty_file(server, cache):
    (server.folder / 'w.pth').touch()
    fetch(f'{server.url}/w.pth')
    assert_fetched(cache, b'')


def test_fetch__server_that_does_not_tell_the_length(server, cache, weights):
    server.tells_length = False
    fetch(f'{server.url}/w.pth')
    assert_fetched(cache, weights)


@pytest.mark.parametrize('cuts', [[CUT], [1], [SIZE - 1], [100_000, 200_001, 300_000, 7]])
def test_fetch__cut_download_goes_on_in_the_same_call(cuts, server, cache, weights, pauses):
    server.cuts = list(cuts)
    fetch(f'{server.url}/w.pth', hashlib.sha256(weights).hexdigest())
    assert_fetched(cache, weights)
    starts = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    assert [answer.start for answer in server.answers] == starts
    assert [answer.status for answer in server.answers] == [200] + len(cuts) * [206]
    assert sum(answer.given for answer in server.answers) == SIZE
    assert pauses == len(cuts) * [0.5]


def test_fetch__more_cuts_than_attempts(server, cache, weights):
    """Each of them brought something."""
    server.cuts = 20 * [40_000]
    fetch(f'{server.url}/w.pth')
    assert_fetched(cache, weights)
    assert [answer.start for answer in server.answers] == list(range(0, 840_000, 40_000))


def test_fetch__cut_download_goes_on_in_a_later_call(server, cache, weights):
    interrupt(server, f'{server.url}/w.pth')
    assert (cache / 'w.pth.part').read_bytes() == weights[:CUT]
    fetch(f'{server.url}/w.pth')
    assert server.answers == [REST]
    assert_fetched(cache, weights)


def test_fetch__cut_download_behind_a_redirection(server, cache, weights):
    server.cuts = [CUT]
    fetch(f'{server.url}/moved/w.pth')
    assert server.answers == [FIRST, REST]
    assert_fetched(cache, weights)


def test_fetch__silent_server_is_asked_again(server, cache, weights, monkeypatch):
    monkeypatch.setattr('mmhdistill.models.teachers.fetch._TIMEOUT', 3)
    server.holds = [CUT]
    fetch(f'{server.url}/w.pth')
    assert server.answers == [FIRST, REST]
    assert_fetched(cache, weights)


@pytest.mark.parametrize('etag, dated', [('"{}"', True), ('"{}"', False), (None, True), ('W/"{}"', True)])
def test_fetch__changed_file_comes_whole(etag, dated, server, cache, weights):
    """Known by its ETag, or else by its date; of a weak ETag no resuming server is sure."""
    server.etag, server.dated = etag, dated
    interrupt(server, f'{server.url}/w.pth')
    changed = some_bytes(seed=1, size=SIZE + 5)
    (server.folder / 'w.pth').write_bytes(changed)
    os.utime(server.folder / 'w.pth', (0, 0))
    fetch(f'{server.url}/w.pth')
    assert server.answers == [Answer(200, 0, SIZE + 5)]
    assert_fetched(cache, changed)


@pytest.mark.parametrize('etag, dated', [('"{}"', False), (None, True), ('W/"{}"', True), (None, False)])
def test_fetch__unchanged_file_is_resumed_by_etag_or_date(etag, dated, server, cache, weights):
    server.etag, server.dated = etag, dated
    interrupt(server, f'{server.url}/w.pth')
    fetch(f'{server.url}/w.pth')
    assert server.answers == [REST]
    assert_fetched(cache, weights)


def test_fetch__file_of_two_versions_does_not_pass_its_hash(server, cache, weights):
    """Of a server that tells no versions apart, two are put together; the hash refuses them, and the next call is
    clean."""
    server.etag, server.dated = None, False
    interrupt(server, f'{server.url}/w.pth')
    changed = some_bytes(seed=1)
    (server.folder / 'w.pth').write_bytes(changed)
    mixture = hashlib.sha256(weights[:CUT] + changed[CUT:]).hexdigest()
    digest = hashlib.sha256(changed).hexdigest()
    with pytest.raises(RuntimeError, match=f'has sha256 {mixture}, and {digest} is expected'):
        fetch(f'{server.url}/w.pth', digest)
    assert files(cache) == []
    fetch(f'{server.url}/w.pth', digest)
    assert_fetched(cache, changed)


def test_fetch__server_without_ranges(server, cache, weights):
    server.ranges, server.cuts = False, [CUT, CUT + 1]
    fetch(f'{server.url}/w.pth')
    assert server.answers == [FIRST, Answer(200, 0, CUT + 1), Answer(200, 0, SIZE)]
    assert_fetched(cache, weights)


def test_fetch__server_without_ranges_that_always_cuts(server, cache, weights, pauses):
    """Bytes that come again are no progress."""
    server.ranges, server.cuts = False, 20 * [CUT]
    url = f'{server.url}/w.pth'
    with pytest.raises(RuntimeError) as caught:
        fetch(url)
    assert str(caught.value) == sentence(url, f'the connection was cut after {CUT} of {SIZE} bytes', cache)
    assert server.answers == (1 + ATTEMPTS) * [FIRST]
    assert pauses == [0.5, 1, 2, 4, 8]


@pytest.mark.parametrize('shift', [-4, 4])
def test_fetch__server_that_gives_another_part(shift, server, cache, weights):
    server.shift, server.cuts = shift, [CUT]
    fetch(f'{server.url}/w.pth')
    assert [(answer.status, answer.start) for answer in server.answers] == [(200, 0), (206, CUT + shift), (200, 0)]
    assert_fetched(cache, weights)


def test_fetch__part_of_another_url_is_not_resumed(server, cache, weights):
    (server.folder / 'other').mkdir()
    (server.folder / 'other/w.pth').write_bytes(some_bytes(seed=1))
    # With the same date and no ETag, only the URL tells them apart.
    server.etag = None
    for file in ('w.pth', 'other/w.pth'):
        os.utime(server.folder / file, (0, 0))
    interrupt(server, f'{server.url}/w.pth')
    fetch(f'{server.url}/other/w.pth')
    assert server.answers == [Answer(200, 0, SIZE)]
    assert_fetched(cache, some_bytes(seed=1))


def test_fetch__part_that_is_complete_is_not_fetched_again(server, cache, weights, monkeypatch):
    """Of a process that was stopped before it gave the file its name."""
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', stop)
        fetch(f'{server.url}/w.pth')
    assert (cache / 'w.pth.part').read_bytes() == weights
    fetch(f'{server.url}/w.pth', hashlib.sha256(weights).hexdigest())
    assert server.answers == [Answer(200, 0, SIZE), Answer(416)]
    assert_fetched(cache, weights)


def test_fetch__part_longer_than_the_file_is_dropped(server, cache, weights):
    server.etag, server.dated = None, False
    interrupt(server, f'{server.url}/w.pth')
    (server.folder / 'w.pth').write_bytes(some_bytes(seed=1, size=1000))
    fetch(f'{server.url}/w.pth')
    assert server.answers == [Answer(416), Answer(200, 0, 1000)]
    assert_fetched(cache, some_bytes(seed=1, size=1000))


@pytest.mark.parametrize('note', ['', '{"url": "http', '[]', '"w.pth"', '7', None])
def test_fetch__part_without_a_readable_note_is_not_resumed(note, server, cache, weights):
    interrupt(server, f'{server.url}/w.pth')
    if note is None:
        (cache / 'w.pth.part.json').unlink()
    else:
        (cache / 'w.pth.part.json').write_text(note)
    fetch(f'{server.url}/w.pth')
    assert server.answers == [Answer(200, 0, SIZE)]
    assert_fetched(cache, weights)


@pytest.mark.parametrize('step', ['mmhdistill.models.teachers.fetch.open', 'pathlib.Path.write_text'])
def test_fetch__stopped_while_a_changed_file_begins(step, server, cache, weights, monkeypatch):
    """The new version's note never lies beside the old version's bytes."""
    def stop(*args):
        raise KeyboardInterrupt

    interrupt(server, f'{server.url}/w.pth')
    changed = some_bytes(seed=1)
    (server.folder / 'w.pth').write_bytes(changed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, stop, raising=False)
        fetch(f'{server.url}/w.pth')
    fetch(f'{server.url}/w.pth')
    assert_fetched(cache, changed)


def test_fetch__not_found_is_asked_for_once(server, cache, pauses):
    url = f'{server.url}/w.pth'
    with pytest.raises(RuntimeError) as caught:
        fetch(url)
    assert str(caught.value) == sentence(url, 'HTTP Error 404: Not Found', cache)
    assert (server.answers, pauses, files(cache)) == ([Answer(404)], [], [])


@pytest.mark.parametrize('status', [429, 500, 503])
def test_fetch__busy_server_is_asked_again(status, server, cache, weights, pauses):
    server.refusals = (ATTEMPTS - 1) * [status]
    fetch(f'{server.url}/w.pth')
    assert server.answers == (ATTEMPTS - 1) * [Answer(status)] + [Answer(200, 0, SIZE)]
    assert pauses == [1, 2, 4, 8]
    assert_fetched(cache, weights)


def test_fetch__gives_up(server, cache, weights, pauses):
    url = f'{server.url}/w.pth'
    server.refusals = 20 * [503]
    with pytest.raises(RuntimeError) as caught:
        fetch(url)
    assert str(caught.value) == sentence(url, 'HTTP Error 503: Service Unavailable', cache)
    assert server.answers == ATTEMPTS * [Answer(503)]
    assert pauses == [1, 2, 4, 8]
    assert files(cache) == []


def test_fetch__refused_connection_is_told_at_once(cache, pauses):
    with socket.socket() as taken:
        # Bound, but it does not listen.
        taken.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{taken.getsockname()[1]}/folder/w.pth'
        with pytest.raises(RuntimeError) as caught:
            fetch(url)
    assert str(caught.value) == sentence(url, '<urlopen error [Errno 111] Connection refused>', cache)
    assert (pauses, files(cache)) == ([], [])


def test_fetch__unknown_host_is_told_at_once(cache, pauses):
    url = 'http://nowhere.invalid/a/b/resolve/main/w.pth'
    with pytest.raises(RuntimeError) as caught:
        fetch(url)
    assert re.sub(r'\(.*?\)', '()', str(caught.value), count=1) == sentence(url, '', cache, 'a--b--w.pth')
    assert (pauses, files(cache)) == ([], [])
