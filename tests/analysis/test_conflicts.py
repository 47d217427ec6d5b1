import importlib.util
from importlib import metadata

import pytest

from mmhdistill.analysis.conflicts import CONFLICTS, Environment, find_conflicts

STOCK = {'torch': '2.13.0+cpu', 'torchvision': '0.28.0', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmpretrain': '1.2.0',
         'mmdet': '3.3.0', 'mmsegmentation': '1.2.2', 'setuptools': '81.0.0', 'transformers': '4.48.3'}
FORKS = {'torch': '2.13.0', 'torchvision': '0.28.0', 'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6',
         'onedl-mmpretrain': '1.3.6', 'onedl-mmdetection': '3.5.1', 'onedl-mmsegmentation': '1.4.2'}
NO_OPS = {'mmcv.ops': "ModuleNotFoundError: No module named 'mmcv._ext'"}
OLD_OPS = {'mmcv.ops': 'ImportError: mmcv/_ext.so: undefined symbol: _ZN3c106detail'}
CPU_BUILD = {'torchvision': 'RuntimeError: operator torchvision::nms does not exist'}


@pytest.fixture
def found(monkeypatch):
    """Conflicts of packages, given as versions, and of modules that there are not."""

    def find(versions, missing=(), errors=None, made_for='2.13.0'):
        def version(package):
            if package not in versions:
                raise metadata.PackageNotFoundError(package)
            return versions[package]

        monkeypatch.setattr(metadata, 'version', version)
        monkeypatch.setattr(metadata, 'requires', lambda package: ['numpy', f'torch=={made_for}'])
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name in missing else name)
        return [(conflict.name, seen) for conflict, seen in find_conflicts(Environment(errors or {}))]

    return find


@pytest.mark.parametrize('versions', [
    STOCK, FORKS, {name: version for name, version in STOCK.items() if 'mm' not in name},
    {'torch': '2.5.0', 'mmengine': '0.10.7', 'mmcv-lite': '2.1.0', 'mmpretrain': '1.2.0'}
])
def test_find_conflicts__none(versions, found):
    assert found(versions) == []


@pytest.mark.parametrize('versions, missing, errors, name, seen', [
    ({**STOCK, 'onedl-mmengine': '0.10.12'}, (), {}, 'maintained forks',
     'mmengine, mmcv, mmpretrain, mmdet, mmsegmentation and their maintained forks onedl-mmengine are installed '
     'together, and overwrite each other.'),
    # Another library of the other kind, of which nothing is overwritten yet.
    ({**FORKS, 'mmdet': '3.3.0'}, (), {}, 'maintained forks',
     'mmdet and their maintained forks onedl-mmengine, onedl-mmcv, onedl-mmpretrain, onedl-mmdetection, '
     'onedl-mmsegmentation are installed together, and overwrite each other.'),
    (STOCK, ('pkg_resources', ), {}, 'setuptools',
     'mmengine needs pkg_resources, which setuptools dropped in version 82.'),
    (STOCK, ('mmcv', ), {}, 'mmcv', "mmhdistill's models need mmcv, which is not installed."),
    (STOCK, ('mmpretrain', ), {}, 'mmpretrain', "mmhdistill's models need mmpretrain, which is not installed."),
    ({**STOCK, 'transformers': '4.53.0'}, (), {}, 'transformers',
     'transformers 4.53.0 is installed, and mmpretrain cannot be imported beside transformers > 4.48.3.'),
    ({**STOCK, 'torch': '2.4.1'}, (), {}, 'torch', 'torch 2.4.1 is older than 2.5.'),
    ({**STOCK, 'torch': '2.12.0'}, (), {}, 'torchvision',
     'torchvision 0.28.0 is made for torch 2.13.0, and 2.12.0 is there.'),
    (STOCK, (), CPU_BUILD, 'torchvision', 'torchvision is of another build (CUDA or CPU) than torch.'),
    ({**STOCK, 'mmcv': '2.2.0'}, (), {}, 'mmcv',
     'mmcv 2.2.0 is installed, and mmdet and mmsegmentation refuse mmcv >= 2.2.0.'),
    (STOCK, (), NO_OPS, 'mmcv',
     'mmdet and mmsegmentation need the compiled operators of mmcv, which has none here.'),
    (FORKS, (), NO_OPS, 'mmcv',
     'onedl-mmdetection and onedl-mmsegmentation need the compiled operators of mmcv, which has none here.'),
    (STOCK, (), OLD_OPS, 'mmcv',
     "mmcv's operators were compiled for another torch than the one that is installed."),
    (STOCK, ('ftfy', ), {}, 'ftfy and regex', 'mmsegmentation needs ftfy without saying so.'),
    (FORKS, ('ftfy', 'regex'), {}, 'ftfy and regex', 'onedl-mmsegmentation needs ftfy and regex without saying so.'),
    ({**STOCK, 'openmim': '0.3.9'}, (), {}, 'openmim',
     'openmim is installed, and replaces setuptools and others by old ones.'),
])
def test_find_conflicts__one(versions, missing, errors, name, seen, found):
    expected = [(name, seen)]
    if versions.get('torch') == '2.4.1':
        expected.append(('torchvision', 'torchvision 0.28.0 is made for torch 2.13.0, and 2.4.1 is there.'))
    assert found(versions, missing, errors) == expected


def test_find_conflicts__two_mmcvs_and_no_operators(found):
    assert found({**STOCK, 'mmcv-lite': '2.1.0'}) == [
        ('mmcv', 'mmcv and mmcv-lite are both installed and overwrite each other.'),
        ('mmcv', 'mmdet and mmsegmentation need the compiled operators of mmcv, which has none here.')]


def test_find_conflicts__lite_mmcv_is_enough_without_detection(found):
    versions = {'mmengine': '0.10.7', 'mmcv-lite': '2.1.0', 'mmpretrain': '1.2.0'}
    assert found(versions, errors=NO_OPS) == []
    assert found({**versions, 'mmdet': '3.3.0'}) == [
        ('mmcv', 'mmdet need the compiled operators of mmcv, which has none here.')]


def test_conflicts__each_has_a_cure():
    assert all('install' in conflict.cure or 'environment' in conflict.cure for conflict in CONFLICTS)
    # torchvision's operators alone are cured by importing mmhdistill.
    assert [conflict.name for conflict in CONFLICTS if conflict.cured] == ['torchvision']
    assert [conflict.name for conflict in CONFLICTS if conflict.stops] == [
        'maintained forks', 'setuptools', 'mmcv', 'mmpretrain', 'transformers', 'mmcv']
