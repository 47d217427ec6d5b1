"""Weight files are read as data, never run."""
import argparse
import hashlib
import os
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmhdistill.models.teachers.files import file_digest, read_tensors
from tests.helpers import Payload


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


class Called:
    """Unpickled as a call of ``function``, then a change of what it returned."""

    def __init__(self, function, args, state=None):
        self.reduced = function, args, state

    def __reduce__(self):
        return self.reduced


class Settings(argparse.Namespace):
    """A class of the file's author: not argparse's own."""


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


def small_file(kind, folder):
    path = folder / ('w.safetensors' if kind == 'safetensors' else 'w.pth')
    if kind == 'safetensors':
        save_file({'a': torch.ones(20)}, path)
    elif kind == 'torchscript':
        torch.jit.script(nn.Linear(3, 3)).save(path)
    else:
        torch.save({'a': torch.ones(20)}, path, _use_new_zipfile_serialization=kind == 'zip')
    return path


def rewritten(source, target, change):
    """An archive with some of its entries changed: ``change(name, bytes)``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def refusal(path, reason):
    return (f'weight file {path} cannot be read: it is damaged, or holds Python objects that could run code, which are '
            f'refused ({reason}). Fetch it again, or save its state_dict alone with torch.save.')


def test_read_tensors__safetensors(tmp_path):
    expected = {name: x.contiguous() for name, x in some_tensors().items()}
    save_file(expected, tmp_path / 'w.safetensors')
    assert_same(read_tensors(tmp_path / 'w.safetensors').tensors, expected)


@pytest.mark.parametrize('name', ['w.pth', 'w.bin', 'w'])
def test_read_tensors__safetensors_by_content(name, tmp_path):
    expected = {name: x.contiguous() for name, x in some_tensors().items()}
    save_file(expected, tmp_path / name)
    assert_same(read_tensors(tmp_path / name).tensors, expected)


def test_read_tensors__brace_alone_is_no_safetensors(tmp_path):
    """A file of JSON is refused as what it is, not by the other reader."""
    (tmp_path / 'w.pth').write_text('[[[[[[[[{}]]]]]]]]')
    with pytest.raises(ValueError, match=r'cannot be read: .*\(UnpicklingError: Unsupported operand 91\)'):
        read_tensors(tmp_path / 'w.pth')


@pytest.mark.parametrize('zipped', [True, False])
def test_read_tensors__torch_file(zipped, tmp_path):
    torch.save(some_tensors(), tmp_path / 'w.pth', _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / 'w.pth') is zipped
    assert_same(read_tensors(tmp_path / 'w.pth').tensors, some_tensors())


@pytest.mark.parametrize('nest, entry, beside', [
    (lambda x: x, '', []),
    (lambda x: {'state_dict': x, 'epoch': 3}, 'state_dict', ['epoch']),
    (lambda x: {'meta': {'a': 'b'}, 'model': x, 7: 'seven'}, 'model', ['meta', '7']),
    (lambda x: {'student': {}, 'teacher': x, 'epoch': 3}, 'teacher', ['student', 'epoch']),
    (lambda x: {'epoch': 3, 'model': {'state_dict': x, 'ema': {}}}, 'model.state_dict', ['epoch', 'ema']),
])
def test_read_tensors__says_what_it_took_and_what_it_left(nest, entry, beside, tmp_path):
    torch.save(nest(some_tensors()), tmp_path / 'w.pth')
    weights = read_tensors(str(tmp_path / 'w.pth'))
    assert_same(weights.tensors, some_tensors())
    assert (weights.entry, weights.beside) == (entry, beside)


@pytest.mark.parametrize('there, taken', [
    (['teacher', 'model', 'state_dict'], 'state_dict'), (['teacher', 'model'], 'model'), (['ema', 'teacher'], 'teacher')
])
def test_read_tensors__order_of_entries(there, taken, tmp_path):
    """state_dict, model, teacher, however they lie in the file."""
    torch.save({name: {'x': torch.tensor(float(i))} for i, name in enumerate(there)}, tmp_path / 'w.pth')
    weights = read_tensors(tmp_path / 'w.pth')
    assert weights.tensors['x'].item() == there.index(taken)
    assert (weights.entry, weights.beside) == (taken, [name for name in there if name != taken])


def test_read_tensors__entry_that_is_no_dict_is_no_entry(tmp_path):
    torch.save({'state_dict': None, 'model': 'vit_small', 'teacher': some_tensors()}, tmp_path / 'w.pth')
    weights = read_tensors(tmp_path / 'w.pth')
    assert_same(weights.tensors, some_tensors())
    assert (weights.entry, weights.beside) == ('teacher', ['state_dict', 'model'])


def test_read_tensors__only_tensors_are_returned(tmp_path):
    torch.save({**some_tensors(), 'epoch': 3, 'names': ['a']}, tmp_path / 'w.pth')
    assert_same(read_tensors(tmp_path / 'w.pth').tensors, some_tensors())


@pytest.mark.parametrize('inside, entry', [(lambda x: x, 'model_ema'), (lambda x: {'model': x}, 'model_ema.model')])
def test_read_tensors__entry_of_choice(inside, entry, tmp_path):
    other = {name: x * 0 for name, x in some_tensors().items()}
    torch.save({'model': other, 'model_ema': inside(some_tensors()), 'epoch': 3}, tmp_path / 'w.pth')
    assert_same(read_tensors(tmp_path / 'w.pth').tensors, other)
    weights = read_tensors(tmp_path / 'w.pth', 'model_ema')
    assert_same(weights.tensors, some_tensors())
    assert (weights.entry, weights.beside) == (entry, ['model', 'epoch'])


@pytest.mark.parametrize('entry', ['ema', 'epoch', 'model.ema', ''])
def test_read_tensors__entry_that_is_not_there(entry, tmp_path):
    path = tmp_path / 'w.pth'
    torch.save({'model': {'ema': some_tensors()}, 'epoch': 3, 'model_ema': some_tensors()}, path)
    with pytest.raises(ValueError) as caught:
        read_tensors(path, entry)
    assert str(caught.value) == f"weight file {path} has no entry '{entry}': its entries are ['model', 'model_ema']."


def test_read_tensors__entry_of_a_file_of_bare_tensors(tmp_path):
    save_file({'a': torch.ones(2)}, tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match=r"w\.safetensors has no entry 'model': its entries are \[\]\."):
        read_tensors(tmp_path / 'w.safetensors', 'model')


def test_read_tensors__torchscript(tmp_path):
    torch.manual_seed(0)
    module = Scripted()
    torch.jit.script(module).save(tmp_path / 'w.pt')
    assert_same(read_tensors(tmp_path / 'w.pt').tensors, module.state_dict())


def test_read_tensors__torchscript_views_of_one_storage(tmp_path):
    module = nn.Linear(2, 2)
    whole = torch.arange(24.0).reshape(4, 6)
    module.register_buffer('rows', whole[2:])
    module.register_buffer('column', whole[:, 3])
    torch.jit.script(module).save(tmp_path / 'w.pt')
    tensors = read_tensors(tmp_path / 'w.pt').tensors
    assert tensors['rows'].tolist() == [[12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23]]
    assert tensors['column'].tolist() == [3, 9, 15, 21]


def test_read_tensors__torchscript_with_an_empty_buffer(tmp_path):
    module = nn.Linear(2, 2)
    module.register_buffer('empty', torch.zeros(0, 4))
    torch.jit.script(module).save(tmp_path / 'w.pt')
    assert_same(read_tensors(tmp_path / 'w.pt').tensors, module.state_dict())


def test_read_tensors__torchscript_code_is_not_even_compiled(tmp_path):
    module = Scripted()
    torch.jit.script(module).save(tmp_path / 'w.pt')
    rewritten(tmp_path / 'w.pt', tmp_path / 'broken.pt',
              lambda name, data: b'this is no code' if name.endswith('.py') else data)
    with pytest.raises(RuntimeError):
        torch.jit.load(tmp_path / 'broken.pt')
    assert_same(read_tensors(tmp_path / 'broken.pt').tensors, module.state_dict())


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('hide', [lambda x: x, lambda x: argparse.Namespace(lr=x), lambda x: {'a': [1, (x, )]}])
def test_read_tensors__refuses_a_payload(hide, zipped, tmp_path, monkeypatch):
    proof, path = tmp_path / 'ran', tmp_path / 'w.pth'
    torch.save({'model': some_tensors(), 'extra': hide(Payload(proof))}, path, _use_new_zipfile_serialization=zipped)
    # The user's leave to run code in other files does not count here.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    assert str(caught.value) == refusal(path, f'it asks for {os.mkdir.__module__}.mkdir')
    assert not proof.exists()
    # The payload is live: a reader that runs code does make the folder.
    torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize('extra, asked', [
    (nn.Linear(2, 2), 'torch.nn.modules.linear.Linear'), (argparse.ArgumentParser, 'argparse.ArgumentParser'),
    (Settings(lr=0.1), f'{__name__}.Settings'), (eval, 'eval'), (os.system, f'{os.system.__module__}.system')
])
def test_read_tensors__refuses_any_other_class_by_name(extra, asked, tmp_path):
    torch.save({'model': some_tensors(), 'extra': extra}, tmp_path / 'w.pth')
    with pytest.raises(ValueError) as caught:
        read_tensors(tmp_path / 'w.pth')
    assert str(caught.value) == refusal(tmp_path / 'w.pth', f'it asks for {asked}')


@pytest.mark.parametrize('zipped', [True, False])
def test_read_tensors__command_line_of_the_training(zipped, tmp_path):
    path = tmp_path / 'w.pth'
    arguments = argparse.Namespace(lr=0.1, optimizer=argparse.Namespace(betas=(0.9, 0.95)), steps=[1, 2])
    torch.save({'model': some_tensors(), 'args': arguments}, path, _use_new_zipfile_serialization=zipped)
    weights = read_tensors(path)
    assert_same(weights.tensors, some_tensors())
    assert (weights.entry, weights.beside) == ('model', ['args'])
    # The leave is the reader's own: torch's is as narrow as before.
    with pytest.raises(pickle.UnpicklingError, match='argparse.Namespace was not an allowed global'):
        torch.load(path, weights_only=True)


def test_read_tensors__namespace_runs_nothing_when_it_is_called(tmp_path):
    """A pickle that calls Namespace with arguments, and one that sets a method on it, come to attributes at most."""
    proof, path = tmp_path / 'ran', tmp_path / 'w.pth'
    for extra in (Called(argparse.Namespace, (Payload(proof), )), Called(argparse.Namespace, (), Payload(proof))):
        torch.save({'model': some_tensors(), 'extra': extra}, path)
        with pytest.raises(ValueError, match=f'it asks for {os.mkdir.__module__}.mkdir'):
            read_tensors(path)
        assert not proof.exists()
    torch.save({'model': some_tensors(), 'extra': Called(argparse.Namespace, (1, ))}, path)
    with pytest.raises(ValueError, match='cannot be read: .*TypeError'):
        read_tensors(path)


def test_read_tensors__refuses_a_payload_in_a_torchscript_archive(tmp_path):
    proof, path = tmp_path / 'ran', tmp_path / 'w.pt'
    torch.jit.script(Scripted()).save(tmp_path / 'good.pt')
    payload = pickle.dumps(Payload(proof), protocol=2)
    rewritten(tmp_path / 'good.pt', path, lambda name, data: payload if name.endswith('/data.pkl') else data)
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


@pytest.mark.parametrize('name, problem', [
    ('no.pth', 'does not exist: give the path of an existing file.'),
    ('folder', 'is a folder: give the path of a file in it.'),
    ('folder/w.pth', 'does not exist: give the path of an existing file.')])
def test_read_tensors__no_file(name, problem, tmp_path):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        read_tensors(tmp_path / name)
    assert str(caught.value) == f'{tmp_path / name} {problem}'


def test_read_tensors__path_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(some_tensors(), tmp_path / 'w.pth')
    assert_same(read_tensors('~/w.pth').tensors, some_tensors())


@pytest.mark.parametrize('size', [0, 8, 16])
def test_read_tensors__torchscript_storage_of_another_size(size, tmp_path):
    module = nn.Linear(1, 1, bias=False)
    module.register_buffer('three', torch.ones(3))
    torch.jit.script(module).save(tmp_path / 'good.pt')
    assert read_tensors(tmp_path / 'good.pt').tensors['three'].tolist() == [1, 1, 1]
    path = rewritten(tmp_path / 'good.pt', tmp_path / 'w.pt', lambda name, data: bytes(size)
                     if '/data/' in name and len(data) == 12 else data)
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    assert re.fullmatch(re.escape(f'weight file {path} cannot be read: ') + r'.*\(ValueError: good/data/\d has '
                        + rf'{size} bytes, for 3 of torch\.float32\)\. Fetch it again, .*', str(caught.value))


def test_read_tensors__torchscript_module_under_two_names(tmp_path):
    """torch writes it twice."""
    module = nn.Sequential(nn.Linear(2, 2))
    module.append(module[0])
    torch.jit.script(module).save(tmp_path / 'w.pt')
    tensors = read_tensors(tmp_path / 'w.pt').tensors
    assert torch.equal(tensors['0.weight'], module[0].weight)
    assert torch.equal(tensors['1.weight'], module[0].weight)


OBJECT, KEY = b'c__torch__\nModule\n)\x81', b'X\x01\x00\x00\x00'


def archive(path, pickled):
    """A TorchScript archive, with a pickle written by hand."""
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('w/constants.pkl', b'')
        file.writestr('w/data.pkl', b'\x80\x02' + pickled + b'.')
    return path


@pytest.mark.parametrize('pickled', [
    OBJECT + b'q\x00}' + KEY + b'ah\x00sb',
    OBJECT + b'}' + KEY + b'a' + OBJECT + b'q\x00s' + KEY + b'bh\x00sb'], ids=['inside itself', 'twice'])
def test_read_tensors__torchscript_object_in_two_places(pickled, tmp_path):
    path = archive(tmp_path / 'w.pt', pickled)
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    assert str(caught.value) == refusal(path, 'ValueError: a module of it lies in two places')


def test_read_tensors__torchscript_archive_does_not_reach_the_next(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / 'good.pt')
    expected = read_tensors(tmp_path / 'good.pt').tensors
    # It gives its class a __setstate__ that does nothing: objects would stay empty.
    state = b'N}X\x0c\x00\x00\x00__setstate__ctorch.jit._pickle\nx\ns\x86'
    path = archive(tmp_path / 'w.pt', b'c__torch__\nModule\n' + state + b'b0' + OBJECT + b'}b')
    with pytest.raises(ValueError, match=r'w\.pt holds no tensors by name'):
        read_tensors(path)
    assert set(expected) == {'weight', 'bias'}
    assert_same(read_tensors(tmp_path / 'good.pt').tensors, expected)


@pytest.mark.parametrize('kind', ['safetensors', 'zip', 'legacy', 'torchscript'])
def test_read_tensors__truncated_file(kind, tmp_path):
    """Wherever it was cut, inside a number or an instruction of the pickle too."""
    path = small_file(kind, tmp_path)
    data = path.read_bytes()
    assert read_tensors(path).tensors
    lengths = [*range(0, len(data), max(1, len(data) // 300)), len(data) - 1]
    assert len(lengths) > 140
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError) as caught:
            read_tensors(path)
        assert str(caught.value).startswith(f'weight file {path} cannot be read: it is damaged, or holds'), length
        assert str(caught.value).endswith('). Fetch it again, or save its state_dict alone with torch.save.'), length


@pytest.mark.parametrize('kind', ['safetensors', 'zip', 'legacy', 'torchscript'])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_read_tensors__flipped_bytes(kind, tmp_path):
    """A damaged file is read or refused, never a crash with an error of the reader's own."""
    path = small_file(kind, tmp_path)
    data, refused = path.read_bytes(), 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        place, value = (int(torch.randint(bound, (), generator=generator)) for bound in (len(data), 256))
        path.write_bytes(data[:place] + bytes([value]) + data[place + 1:])
        try:
            read_tensors(path)
        except ValueError as error:
            refused += str(error).startswith(f'weight file {path} ')
    assert refused > 40


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_read_tensors__empty_file(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f'{name} cannot be read: it is damaged'):
        read_tensors(tmp_path / name)


def test_read_tensors__web_page_in_place_of_weights(tmp_path):
    (tmp_path / 'w.pth').write_text('<html>404</html>')
    with pytest.raises(ValueError) as caught:
        read_tensors(tmp_path / 'w.pth')
    # Not torch's advice, which begins with how to run the code of a file.
    assert str(caught.value) == refusal(tmp_path / 'w.pth', 'UnpicklingError: Unsupported operand 60')


@pytest.mark.parametrize('content', [{}, {'epoch': 3}, torch.ones(2), [torch.ones(2)], {'state_dict': {}}])
def test_read_tensors__no_tensors_by_name(content, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=r"w\.pth holds no tensors by name: expected a state_dict, bare or under"):
        read_tensors(tmp_path / 'w.pth')


def test_read_tensors__safetensors_without_tensors(tmp_path):
    save_file({}, tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match=r'w\.safetensors holds no tensors by name'):
        read_tensors(tmp_path / 'w.safetensors')


def test_file_digest__of_a_file_longer_than_one_block(tmp_path):
    data = bytes(range(256)) * 10000
    (tmp_path / 'w').write_bytes(data)
    assert file_digest(tmp_path / 'w') == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize('algorithm, digest', [
    ('sha256', 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'),
    ('md5', '900150983cd24fb0d6963f7d28e17f72')
])
def test_file_digest__known_values(algorithm, digest, tmp_path):
    (tmp_path / 'w').write_bytes(b'abc')
    assert file_digest(tmp_path / 'w', algorithm) == digest


def test_read_tensors__safetensors_are_copies(tmp_path):
    """What is written to the file later does not reach the weights."""
    path, expected = tmp_path / 'w.safetensors', {'a': torch.arange(1000.), 'b': torch.ones(3)}
    save_file(expected, path)
    tensors = read_tensors(path).tensors
    with open(path, 'r+b') as file:
        file.write(bytes(path.stat().st_size))
    assert_same(tensors, expected)
