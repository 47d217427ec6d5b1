import builtins
import functools
import http.server
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmhdistill import compat
from tests.helpers import Payload

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Versions of the installed packages, to be changed; a module without a package is one that cannot be found."""
    versions = {'mmengine': '0.10.7', 'mmcv-lite': '2.1.0', 'mmpretrain': '1.2.0'}
    modules = {'pkg_resources', 'mmcv', 'mmpretrain'}

    def version(package):
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, 'version', version)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name if name in modules else None)
    return versions, modules


def test_require_openmmlab__all_is_well(installed):
    compat.require_openmmlab()


def test_require_openmmlab__setuptools_without_pkg_resources(installed):
    installed[1].remove('pkg_resources')
    with pytest.raises(ImportError, match=r"setuptools dropped in version 82\. Run: pip install 'setuptools<82'"):
        compat.require_openmmlab()


@pytest.mark.parametrize('module, package', [('mmcv', 'mmcv-lite==2.1.0'), ('mmpretrain', 'mmpretrain==1.2.0')])
def test_require_openmmlab__package_not_installed(module, package, installed):
    installed[1].remove(module)
    with pytest.raises(ImportError, match=f"need {module}, which is not installed. Run: pip install "
                                          f'--no-build-isolation {package}$'):
        compat.require_openmmlab()


@pytest.mark.parametrize('version', ['4.49.0', '4.48.4', '5.0', '4.50.0.dev0'])
def test_require_openmmlab__transformers_too_new(version, installed):
    installed[0]['transformers'] = version
    with pytest.raises(ImportError, match=r"transformers [\d.]+ is installed, and mmpretrain cannot be imported beside "
                                          r"transformers > 4\.48\.3\. Run: pip install 'transformers<=4\.48\.3'"):
        compat.require_openmmlab()


@pytest.mark.parametrize('version', ['4.48.3', '4.5', '4.28.0', '3.10.99'])
def test_require_openmmlab__transformers_old_enough(version, installed):
    installed[0]['transformers'] = version
    compat.require_openmmlab()


def test_require_openmmlab__two_mmcvs(installed):
    installed[0]['mmcv'] = '2.1.0'
    with pytest.raises(ImportError, match='mmcv and mmcv-lite are both installed and overwrite each other. Run: pip '
                                          'uninstall -y mmcv mmcv-lite, then install one'):
        compat.require_openmmlab()


@pytest.mark.parametrize('text, version', [('2.13.0+cpu', (2, 13, 0)), ('4.48.3', (4, 48, 3)), ('5', (5, )),
                                           ('1.2.3.4', (1, 2, 3))])
def test_installed_version__numbers(text, version, installed):
    installed[0]['x'] = text
    assert compat.installed_version('x') == version
    assert compat.installed_version('y') is None


def runner_checkpoint():
    """What mmengine's Runner saves beside the weights."""
    buffer = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 2], max_length=10)
    return dict(
        state_dict=dict(w=torch.arange(3.)),
        message_hub=dict(log_scalars={'train/loss': buffer}, runtime_info={'iter': 3}),
        meta=dict(seed=np.int64(7), time=np.float32(0.5), done=np.bool_(True), best=np.arange(4, dtype=np.uint8)))


def test_apply__runner_checkpoint_loads_with_weights_only(tmp_path):
    torch.save(runner_checkpoint(), tmp_path / 'epoch_1.pth')
    found = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    assert found['state_dict']['w'].tolist() == [0, 1, 2]
    buffer = found['message_hub']['log_scalars']['train/loss']
    # Sums over one, one and two values.
    assert (buffer.mean(), buffer.max(), buffer.min(), buffer.current()) == (1.75, 4, 1, 4)
    meta = found['meta']
    assert (meta['seed'], meta['time'], meta['done']) == (7, 0.5, True)
    assert meta['best'].tolist() == [0, 1, 2, 3]


class Getattr:
    """Unpickles as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return builtins.getattr, self.arguments


@pytest.mark.parametrize('owner, name', [
    (HistoryBuffer, 'update'), (HistoryBuffer, '__init__'), (HistoryBuffer, '__globals__'),
    (HistoryBuffer, 'register_statistics'), (np.ndarray, 'tofile'), (np.ndarray, 'mean'), (np.dtype, 'mean')
])
def test_apply__any_other_getattr_in_a_checkpoint_is_refused(owner, name, tmp_path):
    torch.save(dict(x=Getattr(owner, name)), tmp_path / 'w.pth')
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match=rf"refused getattr\(.*, '{name}'\)"):
        torch.load(tmp_path / 'w.pth', weights_only=True)


def test_apply__other_objects_in_a_checkpoint_are_refused(tmp_path):
    class_of_ours = dict(x=compat.metadata.PackageNotFoundError())
    torch.save(class_of_ours, tmp_path / 'w.pth')
    with pytest.raises(pickle.UnpicklingError, match='PackageNotFoundError'):
        torch.load(tmp_path / 'w.pth', weights_only=True)


class Part(BaseModule):
    """A module of one weight, from a checkpoint."""

    def __init__(self, **init_cfg):
        super().__init__(dict(type='Pretrained', **init_cfg))
        self.w = nn.Parameter(torch.zeros(3))


def read_file(path):
    CheckpointLoader.load_checkpoint(str(path))


def read_into_a_model(path):
    load_checkpoint(nn.Linear(1, 1), str(path))


def read_by_init_cfg(path):
    Part(checkpoint=str(path)).init_weights()


def read_a_part_by_init_cfg(path):
    Part(checkpoint=str(path), prefix='backbone.').init_weights()


def read_url(path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=path.parent)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        CheckpointLoader.load_checkpoint(f'http://127.0.0.1:{server.server_port}/{path.name}')
    finally:
        server.shutdown()


READERS = [read_file, read_into_a_model, read_by_init_cfg, read_a_part_by_init_cfg, read_url]


@pytest.mark.parametrize('read', READERS)
@pytest.mark.parametrize('name', ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', None])
def test_apply__mmengine_runs_no_code_of_a_checkpoint(read, name, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    if name:
        monkeypatch.setenv(name, '1')
    proof, path = tmp_path / 'ran', tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict={'backbone.w': torch.ones(3)}, optimizer=Payload(proof)), path)
    environment = dict(os.environ)
    with pytest.raises(ValueError, match=rf'checkpoint \S*epoch_1.pth cannot be read: it is damaged, or holds Python '
                                         rf'objects that could run code, which are refused \(it asks for '
                                         rf'{os.mkdir.__module__}\.mkdir\)\. Give another checkpoint'):
        read(path)
    assert not proof.exists()
    # Whatever the user has allowed torch elsewhere is as it was.
    assert dict(os.environ) == environment
    # The payload is live: a reader that runs code does make the folder.
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize('owner, name', [(HistoryBuffer, '__init__'), (np.ndarray, 'tofile')])
def test_apply__mmengine_refuses_any_other_getattr(owner, name, tmp_path):
    torch.save(dict(x=Getattr(owner, name)), tmp_path / 'epoch_1.pth')
    with pytest.raises(ValueError, match=rf"which are refused \(.*refused getattr\(.*, '{name}'\)"):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'epoch_1.pth'))


def test_apply__mmengine_reads_a_checkpoint_of_a_runner(tmp_path):
    torch.save(runner_checkpoint(), tmp_path / 'epoch_1.pth')
    found = CheckpointLoader.load_checkpoint(str(tmp_path / 'epoch_1.pth'), map_location='cpu')
    assert found['state_dict']['w'].tolist() == [0, 1, 2]
    assert found['message_hub']['log_scalars']['train/loss'].mean() == 1.75
    assert found['meta']['seed'] == 7


def test_apply__mmengine_still_says_that_a_file_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth can not be found'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'none.pth'))


@pytest.mark.parametrize('name, key, value', [
    ('mmdet::_base_/datasets/coco_instance.py', 'dataset_type', 'CocoDataset'),
    ('mmseg::_base_/datasets/ade20k.py', 'dataset_type', 'ADE20KDataset'),
    ('mmpretrain::_base_/datasets/imagenet_bs32.py', 'dataset_type', 'ImageNet'),
    ('mmhdistill::hdistill/vit-b_clip-mae_100e.py', 'default_scope', 'mmpretrain')
])
def test_apply__configs_of_the_libraries_are_found(name, key, value, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{name}'\n")
    assert Config.fromfile(path)[key] == value


def test_apply__base_that_is_not_there(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'mmhdistill::hdistill/vit-b.py'\n")
    with pytest.raises(FileNotFoundError, match=r"'mmhdistill::hdistill/vit-b.py' is not in mmhdistill, which has "
                                                r".*'hdistill/vit-b_clip-mae_300e.py'"):
        Config.fromfile(path)


def test_apply__twice_changes_nothing(tmp_path):
    compat.apply()
    compat.apply()
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'mmhdistill::hdistill/vit-b_clip-mae_100e.py'\n")
    assert Config.fromfile(path).train_cfg.max_epochs == 100
    torch.save(runner_checkpoint(), tmp_path / 'epoch_1.pth')
    assert torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['meta']['seed'] == 7


def test_apply__torchvision_without_its_operators_still_imports():
    # A torchvision of another build fails at its first fake kernel, before any transform can be used.
    script = """
import sys, torch
first = True
class Broken:
    def find_spec(self, name, path=None, target=None):
        global first
        if name == 'torchvision' and first:
            first = False
            raise RuntimeError('operator torchvision::nms does not exist')
sys.meta_path.insert(0, Broken())
from mmhdistill import compat
import torchvision.transforms as T
print(T.functional.hflip(torch.arange(3)[None, None]).flatten().tolist())
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split('\n')[0] == '[2, 1, 0]'
