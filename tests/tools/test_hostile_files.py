"""What a stranger may have written, a checkpoint, a teacher's weights, settings, does not run code."""
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import Payload

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(config, monkeypatch):
    """Runs a tool in the folder of the config."""
    monkeypatch.chdir(config.parent)

    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, str(config), *map(str, args)])
        runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')

    return run


@pytest.mark.parametrize('name, args', [
    ('train', ['--resume', 'hostile.pth']),
    ('train', ['--cfg-options', 'load_from=hostile.pth']),
    ('train', ['--cfg-options', 'model.teachers.mae.checkpoint=hostile.pth']),
    ('train', ['--cfg-options', 'model.backbone.init_cfg.type=Pretrained',
               'model.backbone.init_cfg.checkpoint=hostile.pth']),
    ('train', ['--cfg-options', 'model.backbone.init_cfg.type=Pretrained',
               'model.backbone.init_cfg.checkpoint=mmhdistill:hostile.pth']),
    ('test', ['hostile.pth']),
])
def test_tools__checkpoint_with_code(name, args, tool, tmp_path):
    proof = tmp_path / 'ran'
    content = dict(state_dict={'backbone.cls_token': torch.zeros(1, 1, 4)}, optimizer=Payload(proof),
                   meta=dict(epoch=1, iter=4, cfg=f'import os\nos.mkdir({str(proof)!r})\n'))
    torch.save(content, tmp_path / 'hostile.pth')
    with pytest.raises(ValueError, match=rf'hostile\.pth cannot be read: .*it asks for {os.mkdir.__module__}\.mkdir'):
        tool(name, *args)
    assert not proof.exists()
    # The payload is live.
    torch.load(tmp_path / 'hostile.pth', weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize('key', ['cfg', 'config'])
def test_tools__checkpoint_whose_config_has_code(key, tool, tmp_path):
    proof = tmp_path / 'ran'
    code = f"__import__('os').mkdir({str(proof)!r})"
    torch.save(dict(state_dict={}, optimizer={}, meta=dict(epoch=1, iter=4, **{key: code})), tmp_path / 'hostile.pth')
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        tool('train', '--resume', 'hostile.pth')
    assert not proof.exists()


@pytest.mark.parametrize('option, refusal', [
    ('model.masker.place=CODE', "unknown place 'CODE'"),
    ('model.losses.relation.distance=CODE', "unknown relation distance 'CODE'"),
    ('model.masker.CODE=1', 'cannot be in the name of a setting'),
    ("x'].CODE#=1", 'cannot be in the name of a setting'),
])
def test_tools__code_in_options_is_a_string(option, refusal, tool, tmp_path):
    proof = tmp_path / 'ran'
    code = f"__import__('os').mkdir('{proof}')"
    with pytest.raises((ValueError, SystemExit)) as caught:
        tool('train', '--cfg-options', option.replace('CODE', code))
    assert refusal.replace('CODE', code) in str(caught.value)
    assert not proof.exists()


@pytest.mark.parametrize('code', ["{{$X:__import__('os').mkdir('PROOF')}}", "!!python/object/apply:os.mkdir ['PROOF']",
                                  "'+__import__('os').mkdir('PROOF')+'", 'exec("import os; os.mkdir(\'PROOF\')")'])
def test_tools__code_in_an_option_that_may_be_any_text(code, tool, tmp_path):
    """It is in the config that the run leaves behind as text, which is read again by running it."""
    from mmengine.config import Config
    proof = tmp_path / 'ran'
    code = code.replace('PROOF', str(proof))
    with pytest.raises(SystemExit, match='no image found'):
        tool('train', '--cfg-options', f'experiment_name={code}', 'train_dataloader.dataset.data_root=none')
    left = next(tmp_path.glob('work_dirs/tiny/*.py'), None)
    if left is not None:
        Config.fromfile(left)
    assert not proof.exists()


def test_tools__misspelt_option_stops_before_anything_is_built(tool, config):
    with pytest.raises(SystemExit) as caught:
        tool('train', '--cfg-options', 'model.masker.keep_rat=0.5')
    assert str(caught.value).startswith(
        f'{config}: the config has settings that nothing would read:\n--cfg-options model.masker.keep_rat: '
        "model.masker: no 'keep_rat' is taken: did you mean 'keep_rate'?")
    with pytest.raises(SystemExit, match="no 'batchsize' is taken: did you mean 'batch_size'"):
        tool('test', 'none.pth', '--cfg-options', 'test_dataloader.batchsize=2')
    assert not (config.parent / 'work_dirs').exists()


def test_tools__misspelt_setting_of_a_config(tool, config):
    config.write_text(config.read_text().replace('schedule=', 'shedule='))
    with pytest.raises(SystemExit, match="custom_hooks.0 is a mmhdistill.RedundantTokenMasker, and no 'shedule' is "
                                         "taken: did you mean 'schedule'"):
        tool('train')
    assert not (config.parent / 'work_dirs').exists()
