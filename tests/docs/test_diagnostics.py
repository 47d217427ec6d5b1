"""docs/diagnostics.md: what it says can be typed, is run."""
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mmhdistill.functional
from mmhdistill.analysis import zoo
from mmhdistill.registry import HOOKS
from tests.helpers import build_distiller, write_images

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs/diagnostics.md').read_text()


def test_functions__are_there():
    named = re.findall(r'^\| `(\w+)` \|', TEXT, re.M)
    assert len(named) == 7
    for name in named:
        assert callable(getattr(mmhdistill.functional, name))


def test_hooks__build(tmp_path):
    block, = re.findall(r'```python\n(.*?)```', TEXT, re.S)
    (tmp_path / 'hooks.py').write_text(block)
    hooks = Config.fromfile(tmp_path / 'hooks.py').custom_hooks
    hooks += [Config.fromstring(f'hook = {text}', '.py').hook
              for text in re.findall(r"`(dict\(type='mmhdistill\.\w+'.*?\))`", TEXT)]
    assert [type(HOOKS.build(hook)).__name__ for hook in hooks] == [
        'RedundantTokenMasker', 'DiversityReportHook', 'KNNEvaluationHook']


@pytest.mark.slow
@pytest.mark.usefixtures('free_memory')
def test_compare__command(tmp_path, monkeypatch, capsys):
    # Teachers of random weights stand for the published files, a small student for the one of 300 epochs.
    of_card = zoo._of_card
    monkeypatch.setattr(zoo, '_of_card', lambda name, file: of_card(name, 'None'))
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'data/imagenet/val', [f'{index}.png' for index in range(2)], size=40)
    arch = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
    model = dict(
        backbone=dict(type='mmhdistill.MaskableVisionTransformer', img_size=32, patch_size=8, arch=arch),
        data_preprocessor=dict(mean=[100.0, 110.0, 120.0], std=[50.0, 55.0, 60.0], bgr_to_rgb=True))
    torch.save(dict(state_dict=build_distiller().state_dict(), meta=dict(cfg=Config(dict(model=model)).pretty_text)),
               'epoch_300.pth')
    command, = re.findall(r'```bash\npython (tools/analysis/compare\.py .*)\n```', TEXT)
    tool, *words = shlex.split(command)
    monkeypatch.setattr(sys, 'argv', [tool, *words, '--num-images', '2'])
    runpy.run_path(str(ROOT / tool), run_name='__main__')
    assert capsys.readouterr().out.endswith('report/report.html\n')
    found = json.loads(Path('report/report.json').read_text())
    assert len(found['models']['deit-vit-b-p16']['nmi']) == 12 and len(found['models']['student']['nmi']) == 3
    # What the page says of the folder.
    assert {path.suffix for path in Path('report').iterdir()} == {'.html', '.png', '.json'}
