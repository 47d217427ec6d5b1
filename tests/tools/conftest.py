"""A recipe that trains and tests in seconds."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmhdistill.models import ViTTeacher
from tests.helpers import randomise, write_images

ROOT = Path(__file__).parents[2]
ITERS = 4

CONFIG = """
_base_ = '{root}/configs/quickstart/hdistill_vit-photos.py'
model = dict(
    teachers=dict(supervised=dict(checkpoint='{data}/supervised.pth'), mae=dict(checkpoint='{data}/mae.pth')),
    masker=dict(keep_rate=0.8))
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs', meta_keys=('img_path', 'split'))]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='{data}/train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(type='mmhdistill.ImageFolder', data_root='{data}/' + folder, with_label=True, split=split,
                 pipeline=test_pipeline) for folder, split in (('train', 'bank'), ('test', 'query'))
        ]))
test_cfg = dict()
test_evaluator = dict(type='mmhdistill.KNNMetric', k=3)
optim_wrapper = dict(type='mmhdistill.auto_amp_optim_wrapper', optimizer=dict(lr=1e-3))
param_scheduler = None
custom_hooks = [dict(type='mmhdistill.RedundantTokenMasker', schedule='linear')]
train_cfg = dict(max_epochs=2)
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=9))
log_processor = dict(window_size=1)
"""


def write_config(folder: Path) -> Path:
    """A config of two epochs of four iterations of two images, in two classes, with its images and teachers."""
    write_images(folder / 'data/train', [f'{label}/{index}.png' for label in 'ab' for index in range(ITERS)])
    write_images(folder / 'data/test', [f'{label}/{index}.png' for label in 'ab' for index in range(3)], seed=1)
    for teacher in Config.fromfile(ROOT / 'configs/quickstart/hdistill_vit-photos.py').model.teachers.values():
        vit = randomise(ViTTeacher(teacher.card, checkpoint=None).vit)
        torch.save(vit.state_dict(), folder / f'data/{teacher.card.name}.pth')
    path = folder / 'tiny.py'
    path.write_text(CONFIG.format(root=ROOT, data=folder / 'data'))
    return path


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)
