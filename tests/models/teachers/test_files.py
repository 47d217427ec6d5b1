"""Weight files are read as data, never run; and fetched once, whole or not at all."""
import hashlib
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmhdistill.models.teachers.files import cache_dir, fetch, read_tensors, sha256


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        'a.weight': torch.randn(3, 4, generator=generator), 'b': torch.arange(5), 'c': torch.tensor(2.5),
        'half': torch.randn(2, 2, generator=generator).half(), 'view': torch.arange(12.).reshape(3, 4).t()[1:]
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


class Payload:
    """Makes the folder ``path`` when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Scripted(nn.Module):
    """Parameters, buffers of several types, a nested module, and code that must not run."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.register_buffer('steps', torch.tensor(7))
        self.register_buffer('mask', torch.tensor([True, False]))
        self.register_buffer('wide', torch.randn(2, 2, dtype=torch.float64))
        self.register_buffer('brief', torch.randn(3).bfloat16())
        self.names = ['x', 'y']

    def forward(self, x):
        return self.layers(x) * self.steps


def truncate(path, left_out):
    data = path.read_bytes()
    path.write_bytes(data[:-left_out])


def test_read_tensors__safetensors(tmp_path):
    expected = {name: x.contiguous() for name, x in some_tensors().items()}
    save_file(expected, tmp_path / 'w.safetensors')
    assert_same(read_tensors(tmp_path / 'w.safetensors'), expected)


@pytest.mark.parametrize('zipped', [True, False])
def test_read_tensors__torch_file(zipped, tmp_path):
    torch.save(some_tensors(), tmp_path / 'w.pth', _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / 'w.pth') is zipped
    assert_same(read_tensors(tmp_path / 'w.pth'), some_tensors())


@pytest.mark.parametrize('nest', [
    lambda x: {'state_dict': x, 'epoch': 3}, lambda x: {'model': x, 'meta': {'a': 'b'}},
    lambda x: {'model': {'state_dict': x}}
])
def test_read_tensors__nested(nest, tmp_path):
    torch.save(nest(some_tensors()), tmp_path / 'w.pth')
    assert_same(read_tensors(str(tmp_path / 'w.pth')), some_tensors())


def test_read_tensors__only_tensors_are_returned(tmp_path):
    torch.save({**some_tensors(), 'epoch': 3, 'names': ['a']}, tmp_path / 'w.pth')
    assert_same(read_tensors(tmp_path / 'w.pth'), some_tensors())


def test_read_tensors__torchscript(tmp_path):
    torch.manual_seed(0)
    module = Scripted()
    torch.jit.script(module).save(tmp_path / 'w.pt')
    assert_same(read_tensors(tmp_path / 'w.pt'), module.state_dict())


def test_read_tensors__torchscript_with_an_empty_buffer(tmp_path):
    module = nn.Linear(2, 2)
    module.register_buffer('empty', torch.zeros(0, 4))
    torch.jit.script(module).save(tmp_path / 'w.pt')
    assert_same(read_tensors(tmp_path / 'w.pt'), module.state_dict())


def test_read_tensors__torchscript_code_is_not_even_compiled(tmp_path):
    module = Scripted()
    torch.jit.script(module).save(tmp_path / 'w.pt')
    with zipfile.ZipFile(tmp_path / 'w.pt') as source, zipfile.ZipFile(tmp_path / 'broken.pt', 'w') as target:
        for name in source.namelist():
            target.writestr(name, b'this is no code' if name.endswith('.py') else source.read(name))
    with pytest.raises(RuntimeError):
        torch.jit.load(tmp_path / 'broken.pt')
    assert_same(read_tensors(tmp_path / 'broken.pt'), module.state_dict())


@pytest.mark.parametrize('zipped', [True, False])
def test_read_tensors__refuses_a_payload(zipped, tmp_path):
    proof, path = tmp_path / 'ran', tmp_path / 'w.pth'
    torch.save({'model': some_tensors(), 'extra': Payload(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f'weight file {re.escape(str(path))} cannot be read: .*could run code'):
        read_tensors(path)
    assert not proof.exists()
    # The payload is live: a reader that runs code does make the folder.
    torch.load(path, weights_only=False)
    assert proof.exists()


def test_read_tensors__refuses_a_payload_in_a_torchscript_archive(tmp_path):
    proof, path = tmp_path / 'ran', tmp_path / 'w.pt'
    torch.jit.script(Scripted()).save(tmp_path / 'good.pt')
    payload = pickle.dumps(Payload(proof), protocol=2)
    with zipfile.ZipFile(tmp_path / 'good.pt') as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            target.writestr(name, payload if name.endswith('/data.pkl') else source.read(name))
    with pytest.raises(ValueError, match=r'run code, .*UnpicklingError: the archive asks for (posix|nt)\.mkdir\)'):
        read_tensors(path)
    assert not proof.exists()
    pickle.loads(payload)
    assert proof.exists()


@pytest.mark.parametrize('module, name', [('builtins', 'eval'), ('os', 'system'), ('torch', 'load'),
                                          ('torch._utils', '_rebuild_tensor'), ('collections', 'defaultdict')])
def test_read_tensors__torchscript_archive_gets_no_other_global(module, name, tmp_path):
    path = tmp_path / 'w.pt'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('w/constants.pkl', b'')
        archive.writestr('w/data.pkl', b'\x80\x02c' + f'{module}\n{name}\n'.encode() + b'.')
    with pytest.raises(ValueError, match=re.escape(f'the archive asks for {module}.{name}')):
        read_tensors(path)


def test_read_tensors__missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pth does not exist: .*checkpoint='auto' to fetch"):
        read_tensors(tmp_path / 'no.pth')


@pytest.mark.parametrize('left_out', [50, 2000])
@pytest.mark.parametrize('kind', ['safetensors', 'zip', 'legacy', 'torchscript'])
def test_read_tensors__truncated_file(kind, left_out, tmp_path):
    path = tmp_path / ('w.safetensors' if kind == 'safetensors' else 'w.pth')
    tensors = {'a': torch.ones(1000)}
    if kind == 'safetensors':
        save_file(tensors, path)
    elif kind == 'torchscript':
        torch.jit.script(nn.Linear(40, 40)).save(path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == 'zip')
    truncate(path, left_out)
    with pytest.raises(ValueError, match=f'weight file {re.escape(str(path))} cannot be read: it is damaged'):
        read_tensors(path)


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_read_tensors__empty_file(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f'{name} cannot be read: it is damaged'):
        read_tensors(tmp_path / name)


def test_read_tensors__web_page_in_place_of_weights(tmp_path):
    (tmp_path / 'w.pth').write_text('<html>404</html>')
    with pytest.raises(ValueError, match=r'w\.pth cannot be read: it is damaged'):
        read_tensors(tmp_path / 'w.pth')


@pytest.mark.parametrize('content', [{}, {'epoch': 3}, torch.ones(2), [torch.ones(2)], {'state_dict': {}}])
def test_read_tensors__no_tensors_by_name(content, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=r"w\.pth holds no tensors by name: expected a state_dict, bare or under"):
        read_tensors(tmp_path / 'w.pth')


def test_read_tensors__safetensors_without_tensors(tmp_path):
    save_file({}, tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match=r'w\.safetensors holds no tensors by name'):
        read_tensors(tmp_path / 'w.safetensors')


def test_sha256__of_a_file_longer_than_one_block(tmp_path):
    data = bytes(range(256)) * 10000
    (tmp_path / 'w').write_bytes(data)
    assert sha256(tmp_path / 'w') == hashlib.sha256(data).hexdigest()


def test_sha256__known_value(tmp_path):
    (tmp_path / 'w').write_bytes(b'abc')
    assert sha256(tmp_path / 'w') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'


def test_cache_dir__variable_else_torch_hub(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('MMHDISTILL_CACHE', raising=False)
    assert cache_dir() == tmp_path / 'torch' / 'hub' / 'checkpoints'
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path / 'mine'))
    assert cache_dir() == tmp_path / 'mine'


@pytest.fixture
def weights(server):
    """A served file's bytes."""
    buffer = io.BytesIO()
    torch.save(some_tensors(), buffer)
    (server.folder / 'w.pth').write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize('digits', [0, 8, 64])
def test_fetch__right_hash(digits, server, cache, weights):
    digest = hashlib.sha256(weights).hexdigest()[:digits] or None
    path = fetch(f'{server.url}/w.pth', digest)
    assert path == cache / 'w.pth'
    assert path.read_bytes() == weights
    assert [file.name for file in cache.iterdir()] == ['w.pth']
    assert_same(read_tensors(path), some_tensors())


def test_fetch__wrong_hash_leaves_no_file(server, cache, weights):
    url = f'{server.url}/w.pth'
    with pytest.raises(RuntimeError, match='invalid hash value') as caught:
        fetch(url, 'deadbeef')
    assert 'deadbeef' in str(caught.value)
    assert list(cache.iterdir()) == []


def test_fetch__wrong_hash_names_the_url(server, cache, weights):
    url = f'{server.url}/w.pth'
    with pytest.raises(RuntimeError, match=re.escape(url)):
        fetch(url, 'deadbeef')


@pytest.mark.parametrize('reason', ['not found', 'refused'])
def test_fetch__unreachable_names_url_and_file(reason, server, cache):
    # Port 9 is the discard service, at which nothing listens.
    url = f'{server.url}/none.pth' if reason == 'not found' else 'http://127.0.0.1:9/none.pth'
    with pytest.raises(RuntimeError, match=f'{re.escape(url)} cannot be fetched') as caught:
        fetch(url)
    assert f'put the file there by hand as {cache / "none.pth"}' in str(caught.value)
    assert list(cache.iterdir()) == []


def test_fetch__cached_file_is_not_fetched_again(server, cache, weights):
    for _ in range(2):
        assert fetch(f'{server.url}/w.pth').read_bytes() == weights
    assert server.requested == ['/w.pth']


def test_fetch__file_put_there_by_hand_needs_no_network(cache):
    cache.mkdir()
    (cache / 'w.pth').write_bytes(b'mine')
    assert fetch('http://127.0.0.1:9/folder/w.pth').read_bytes() == b'mine'


def test_fetch__only_the_first_process_of_a_node_fetches(server, cache, weights, monkeypatch):
    monkeypatch.setattr('mmhdistill.models.teachers.files.get_local_rank', lambda: 1)
    assert fetch(f'{server.url}/w.pth') == cache / 'w.pth'
    assert server.requested == []
