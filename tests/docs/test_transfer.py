"""The configs that docs/transfer.md shows, against the installed libraries."""
import csv
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings

from mmhdistill.engine.optim.layer_decay import find_vits
from mmhdistill.models import MaskableVisionTransformer
from tests.helpers import log_messages

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('free_memory')]
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs/transfer.md').read_text()
BLOCKS = {re.match(r"_base_ = '(\w+)::", block)[1]: block
          for block in re.findall(r'```python\n(.*?)```', TEXT, flags=re.S) if block.startswith('_base_')}


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    """A distiller's checkpoint of a ViT-B/16, as a bare student beside a projector."""
    torch.manual_seed(0)
    vit = MaskableVisionTransformer(arch='base', img_size=224, patch_size=16)
    vit.init_weights()
    path = tmp_path_factory.mktemp('student') / 'epoch_300.pth'
    torch.save(dict(state_dict={**{f'backbone.{name}': x for name, x in vit.state_dict().items()},
                                'losses.feature.projector.weight': torch.zeros(1)}), path)
    return path, vit.state_dict()


def test_every_library_has_its_snippet():
    assert set(BLOCKS) == {'mmdet', 'mmseg', 'mmpretrain'}


@pytest.mark.parametrize('library', BLOCKS)
def test_snippet__starts_from_the_student_and_decays_by_layer(library, student, tmp_path):
    path, weights = student
    config = tmp_path / 'config.py'
    config.write_text(BLOCKS[library].replace('epoch_300.pth', str(path)))
    cfg = Config.fromfile(config)
    import_modules_from_strings(**cfg.custom_imports)
    scope = cfg.get('default_scope', 'mmpretrain')
    assert scope == library
    with DefaultScope.overwrite_default_scope(scope):
        import_modules_from_strings(f'{library}.models')
        model = ROOT_MODELS.build(cfg.model)
        with log_messages() as log:
            model.init_weights()
            rates = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert any('checkpoint of a distiller: 150 tensors' in message for message in log)
    (prefix, vit), = find_vits(model).items()
    assert prefix == 'backbone.'
    for name, x in vit.state_dict().items():
        if name != 'pos_embed' and 'rel_pos' not in name:
            assert torch.equal(x, weights[name]), name
    decay, lr = cfg.optim_wrapper.paramwise_cfg.layer_decay_rate, cfg.optim_wrapper.optimizer.lr
    rate = {name: group['lr'] for group in rates for name in group['param_names']}
    for layer, name in ((0, 'patch_embed.projection.weight'), (1, 'layers.0.ln1.bias'), (12, 'layers.11.ln1.bias')):
        assert rate[prefix + name] == pytest.approx(lr * decay**(13 - layer), rel=1e-12)
    outside = {rate[name] for name in rate if not name.startswith(prefix)}
    assert len(outside) == 1 and outside.pop() == lr
    # The maps, or the class token, are those of the student's own weights.
    model.eval()
    with torch.no_grad():
        features = model.extract_feat(torch.randn(1, 3, 64, 96 if library != 'mmpretrain' else 64))
    shapes = [tuple(x.shape) for x in features] if isinstance(features, tuple | list) else features.shape
    assert shapes == {
        'mmdet': [(1, 256, 16, 24), (1, 256, 8, 12), (1, 256, 4, 6), (1, 256, 2, 3), (1, 256, 1, 2)],
        'mmseg': [(1, 768, 16, 24), (1, 768, 8, 12), (1, 768, 4, 6), (1, 768, 2, 3)],
        'mmpretrain': [(1, 768)]}[library]


def test_measured__the_table_is_that_of_the_file():
    rows = list(csv.DictReader((ROOT / 'docs/transfer-measured.csv').open()))
    table = re.findall(r'^\| (.*) \| (.*) \| ([\d.]+) % \| ([\d.]+) % \|$', TEXT, flags=re.M)
    assert len(table) == len(rows) == 6
    for row, (task, schedule, *figures) in zip(rows, table):
        assert task.startswith(row['task'])
        assert [float(x) for x in figures] == [round(float(row[name]) + 1e-9, 1) for name in ('student', 'random')]
        assert re.search(r'(?:max_epochs=|--iters )(\d+)', row['options'])[1] == re.match(r'\d+', schedule)[0]
        Config.fromfile(ROOT / 'configs/transfer' / row['config'])
