import pytest
import torch
from mmengine.config import Config

from mmhdistill.engine.launch import prepare


@pytest.fixture
def groups(monkeypatch):
    """The back ends of the process groups that would have been made."""
    made = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', made.append)
    return made


def config(folder, **kwargs):
    path = folder / 'my_config.py'
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in kwargs.items()))
    return Config.fromfile(path)


def test_prepare__one_process(tmp_path, groups):
    cfg = config(tmp_path)
    prepare(cfg, 'none', None)
    assert (cfg.launcher, cfg.work_dir) == ('none', 'work_dirs/my_config')
    assert groups == []
    assert 'model_wrapper_cfg' not in cfg


@pytest.mark.parametrize('given, in_config, expected', [('a', 'b', 'a'), (None, 'b', 'b'), ('a', None, 'a')])
def test_prepare__work_dir(given, in_config, expected, tmp_path):
    cfg = config(tmp_path, work_dir=in_config)
    prepare(cfg, 'none', given)
    assert cfg.work_dir == expected


def test_prepare__processes_on_cpu_talk_over_gloo(tmp_path, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = config(tmp_path)
    prepare(cfg, 'pytorch', None)
    assert groups == ['gloo']
    assert cfg.launcher == 'pytorch'
    assert cfg.model_wrapper_cfg == dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    assert not cfg.model_wrapper_cfg.get('find_unused_parameters', False)


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_prepare__gpus_are_left_to_mmengine(launcher, tmp_path, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = config(tmp_path)
    prepare(cfg, launcher, None)
    assert cfg.launcher == launcher
    assert groups == []
    assert 'model_wrapper_cfg' not in cfg


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_prepare__other_launchers_need_gpus(launcher, tmp_path, groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match=f"launcher '{launcher}' needs GPUs, and none is visible: use tools/"):
        prepare(config(tmp_path), launcher, None)
    assert groups == []
