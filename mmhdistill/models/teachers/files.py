"""Reading weight files without running code from them."""
import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...compat import refusal

# What authors' files hold beside tensors: the command line of the training. It holds attributes and has no code.
_HARMLESS = [argparse.Namespace]
_ENTRIES = ('state_dict', 'model', 'teacher')
_STORAGES = {
    'FloatStorage': torch.float32, 'HalfStorage': torch.float16, 'DoubleStorage': torch.float64,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool
}


@dataclass
class Weights:
    """Tensors of a file by name, the ``entry`` of the file that they were in, and what else lay beside it."""

    tensors: dict[str, Tensor]
    entry: str = ''
    beside: list[str] = field(default_factory=list)


def read_tensors(path: str | Path, entry: str | None = None) -> Weights:
    """All tensors of a weight file: safetensors, ``torch.save`` (``weights_only``) or a TorchScript archive.

    Args:
        entry: the dict in the file to read, for example ``model_ema``; by default ``state_dict``, ``model`` or
            ``teacher``, whichever is there first, or the file itself. A Runner with an EMA hook saves the averaged
            weights as ``state_dict``.
    """
    path = existing_file(path)
    content = _read(path)
    taken, beside = '', []
    if entry is not None and not (isinstance(content, dict) and isinstance(content.get(entry), dict)):
        there = [key for key, value in content.items() if isinstance(value, dict)] if isinstance(content, dict) else []
        raise ValueError(f"weight file {path} has no entry '{entry}': its entries are {there}.")
    while isinstance(content, dict):
        names = (entry, ) if entry is not None and not taken else _ENTRIES
        nested = next((key for key in names if isinstance(content.get(key), dict)), None)
        if nested is None:
            break
        beside += [str(key) for key in content if key != nested]
        taken = f'{taken}.{nested}' if taken else nested
        content = content[nested]
    tensors = {name: x for name, x in content.items() if isinstance(x, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f'weight file {path} holds no tensors by name: expected a state_dict, bare or under '
                         f'{", ".join(_ENTRIES)}.')
    return Weights(tensors, taken, beside)


def read_entries(path: str | Path, names: Iterable[str]) -> dict:
    """What lies beside the tensors of a file of ``torch.save`` (``weights_only``) under ``names``, as far as it is."""
    content = _read(existing_file(path))
    return {name: content[name] for name in names if isinstance(content, dict) and name in content}


def existing_file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f'{path} is a folder: give the path of a file in it.')
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: give the path of an existing file.')
    return path


def file_digest(path: str | Path, algorithm: str = 'sha256') -> str:
    """Hexadecimal hash of a file, read in blocks."""
    digest = hashlib.new(algorithm)
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path):
    try:
        return _read_any(path)
    except Exception as error:  # damaged bytes raise anything in the readers: struct.error, AssertionError, ...
        raise ValueError(f'weight file {path} cannot be read: it is damaged, or holds Python objects that could run '
                         f'code, which are refused ({refusal(error)}). Fetch it again, or save its state_dict alone '
                         'with torch.save.') from error


def _read_any(path: Path):
    if _is_safetensors(path):
        return _read_safetensors(path)
    if _is_torchscript(path):
        return _read_torchscript(path)
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(path, map_location='cpu', weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Copies: safetensors' own tensors are views of the file, and change when it is written to."""
    with safe_open(path, 'pt') as file:
        names = list(file.keys())
    tensors = {}
    for name in names:
        # Opened for each, so that what was read of the file is not held beside the copies.
        with safe_open(path, 'pt') as file:
            tensors[name] = file.get_tensor(name).clone()
    return tensors


def _is_safetensors(path: Path) -> bool:
    """By name, or by content: the length of a JSON header, then the header."""
    with path.open('rb') as file:
        length, brace = int.from_bytes(file.read(8), 'little'), file.read(1)
    return path.suffix == '.safetensors' or (brace == b'{' and length < path.stat().st_size)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split('/', 1)[-1] == 'constants.pkl' for name in archive.namelist())


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive; its code is not compiled, let alone run."""
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if name.split('/', 1)[-1] == 'data.pkl')
        with archive.open(data) as file:
            module = _TorchScriptUnpickler(file, archive, data.removesuffix('data.pkl')).load()
    tensors: dict[str, Tensor] = {}
    stack, seen = [('', module)], set()
    while stack:
        prefix, obj = stack.pop()
        if id(obj) in seen:
            raise ValueError('a module of it lies in two places')
        seen.add(id(obj))
        for name, value in vars(obj).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _ScriptObject):
                stack.append((f'{prefix}{name}.', value))
    return tensors


class _ScriptObject:
    """Stands for any class that the archive itself defines: it only holds attributes."""


class _TorchScriptUnpickler(pickle.Unpickler):
    """Knows tensors and attribute holders, nothing else; any other global in the file is refused."""

    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file, encoding='utf-8')
        self._archive = archive
        self._root = root
        # Of this file alone: an archive can set attributes of the class too.
        self._holder = type('Holder', (_ScriptObject, ), {})

    def find_class(self, module: str, name: str):
        if module.startswith('__torch__'):
            return self._holder
        if (module, name) == ('collections', 'OrderedDict'):
            return dict
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if module == 'torch' and name in _STORAGES:
            return _STORAGES[name]
        if module == 'torch.jit._pickle':
            # Type tags of lists and dicts: the value is their first argument.
            return lambda value, *_: value
        raise pickle.UnpicklingError(f'the archive asks for {module}.{name}')

    def persistent_load(self, pid):
        _, dtype, key, _, count, *_ = pid
        entry = self._archive.getinfo(f'{self._root}data/{key}')
        if entry.file_size != count * dtype.itemsize:
            raise ValueError(f'{entry.filename} has {entry.file_size} bytes, for {count} of {dtype}')
        data = bytearray(self._archive.read(entry))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
