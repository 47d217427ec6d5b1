from pathlib import Path

import pytest
from mmengine.config import Config

from mmhdistill.models.students.config_text import read_config_text

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize('name', ['hdistill/vit-b_clip-mae_300e', 'moma/vit-s_moco-mae_100e',
                                  'quickstart/supervised_vit-photos'])
def test_read_config_text__what_mmengine_writes(name):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    assert read_config_text(cfg.pretty_text) == cfg.to_dict()


def test_read_config_text__keys_that_are_no_names_and_nested_values():
    cfg = Config(dict(model={'layers': {'a-b': (1, [2.5e-3, None]), '3': -1}, 'empty': {}, 'one': ('x', )}, flag=True))
    assert read_config_text(cfg.pretty_text) == cfg.to_dict()


def test_read_config_text__runs_nothing(tmp_path):
    trap = tmp_path / 'trap'
    text = '\n'.join([f'model = dict(a=open({str(trap)!r}, "w"))', f'open({str(trap)!r}, "w")',
                      f'a = [open({str(trap)!r}, "w")]', 'b = {**c}', 'd = dict(**dict(e=1))', 'kept = dict(f=(1, 2))'])
    found = read_config_text(text)
    assert found == dict(d=dict(e=1), kept=dict(f=(1, 2)))
    assert not trap.exists()


def test_read_config_text__no_python():
    with pytest.raises(ValueError, match=r'is no config that can be read \('):
        read_config_text('model = <class>')
