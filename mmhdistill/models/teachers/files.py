"""Reading weight files without running code from them, and fetching them."""
import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import torch
from mmengine.dist import barrier, get_local_rank
from mmengine.logging import MMLogger
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_STORAGES = {
    'FloatStorage': torch.float32, 'HalfStorage': torch.float16, 'DoubleStorage': torch.float64,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool
}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weight file by name: safetensors, ``torch.save`` (``weights_only``) or a TorchScript archive.

    A dict nested under ``state_dict`` or ``model`` is taken out.
    """
    path = existing_file(path)
    try:
        content = _read(path)
    except (OSError, EOFError, IndexError, KeyError, RuntimeError, ValueError, SafetensorError, StopIteration,
            pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise ValueError(f'weight file {path} cannot be read: it is damaged, or holds Python objects that could run '
                         f'code, which are refused ({reason}). Fetch it again, or save its state_dict alone with '
                         'torch.save.') from error
    while isinstance(content, dict):
        nested = next((key for key in ('state_dict', 'model') if isinstance(content.get(key), dict)), None)
        if nested is None:
            break
        content = content[nested]
    tensors = {name: x for name, x in content.items() if isinstance(x, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f'weight file {path} holds no tensors by name: expected a state_dict, bare or under '
                         "'state_dict' or 'model'.")
    return tensors


def existing_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'weight file {path} does not exist: give the path of an existing file, or '
                                "checkpoint='auto' to fetch the one that the card names.")
    return path


def sha256(path: str | Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    for part in iter(lambda: file.read(1 << 20), b''):
        digest.update(part)
    return digest.hexdigest()


def cache_dir() -> Path:
    """``$MMHDISTILL_CACHE``, else torch hub's checkpoints folder."""
    return Path(os.environ.get('MMHDISTILL_CACHE') or Path(torch.hub.get_dir()) / 'checkpoints')


def fetch(url: str, sha256_prefix: str | None = None) -> Path:
    """Local path of ``url``: from the cache folder, else downloaded into it by one process of each node."""
    path = cache_dir() / url.rsplit('/', 1)[-1]
    if get_local_rank() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        MMLogger.get_current_instance().info(f'fetching {url} into {path.parent}')
        try:
            # Writes beside the target and renames when the hash agrees.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix, progress=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f'{url} cannot be fetched ({error}). Without a network, put the file there by hand as '
                               f'{path}, set MMHDISTILL_CACHE to the folder that holds {path.name}, or give a file of '
                               'yours: model.teachers.NAME.checkpoint=FILE.') from error
    barrier()
    return path


def _read(path: Path):
    if path.suffix == '.safetensors':
        return load_file(path)
    if _is_torchscript(path):
        return _read_torchscript(path)
    return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))


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
    stack = [('', module)]
    while stack:
        prefix, obj = stack.pop()
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

    def find_class(self, module: str, name: str):
        if module.startswith('__torch__'):
            return _ScriptObject
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
        _, dtype, key, *_ = pid
        data = bytearray(self._archive.read(f'{self._root}data/{key}'))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
