"""Images, a checkpoint and a config of a tiny distiller, recipes, kinds of distillers, and the arithmetic of ViTs."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from tests.helpers import OTHER, build_distiller, tiny_distiller, tiny_student, tiny_teacher

ROOT = Path(__file__).parents[2]
HYBRID = 'configs/hdistill/vit-b_clip-mae_300e.py'
RANDOM = dict(type='mmhdistill.RandomScorer')
DISTILLERS = {
    'input masking': dict(),
    'all tokens': dict(masker=None),
    'encoder masking': dict(masker=dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder', keep_rate=0.6)),
    'class attention': dict(masker=dict(
        type='mmhdistill.ProgressiveTokenMasker', teacher='mae', scorer=dict(type='mmhdistill.CLSAttentionScorer'))),
    'layer scale and gated MLP': dict(backbone=tiny_student(
        layer_scale_init_value=0.1, layer_cfgs=dict(ffn_type='swiglu_fused'), drop_path_rate=0.1)),
    'decoder': dict(
        losses=dict(masked=dict(type='mmhdistill.MaskedFeatureLoss', teacher='clip', decoder=dict(
            type='mmhdistill.MaskDecoder', embed_dims=32, depth=2, num_heads=4))),
        masker=dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.25, scorer=RANDOM)),
    'grids of the teachers': dict(
        masker=None, teachers=dict(clip=dict(tiny_teacher(name='clip', embed_dims=48, **OTHER), image_size=48),
                                   mae=dict(tiny_teacher(name='mae'), image_size=40))),
    'masked teacher': dict(
        masker=dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.25, scorer=RANDOM),
        teachers=dict(clip=tiny_teacher(name='clip'), mae=dict(tiny_teacher(name='mae'), masked=True))),
}


def load(name, **options):
    cfg = Config.fromfile(ROOT / name)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def tiny_config(pipeline=None, **settings):
    """A config of :func:`tiny_distiller`; settings of the model are those that it knows."""
    model = {key: settings.pop(key) for key in list(settings) if key in tiny_distiller()}
    pipeline = pipeline or [dict(type='Resize', scale=32)]
    return Config({
        **dict(
            default_scope='mmpretrain', model=tiny_distiller(**model),
            train_dataloader=dict(
                batch_size=4, drop_last=True, dataset=dict(
                    type='mmhdistill.ImageFolder', data_root='nowhere',
                    pipeline=[dict(type='LoadImageFromFile'), *pipeline, dict(type='PackInputs')])),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2)),
        **settings
    }, cfg_text='# none', filename='tiny.py')


def block(width, tokens):
    """FLOPs of a block with an MLP of four times the width."""
    return 2 * tokens * 12 * width**2 + 4 * tokens**2 * width


def stem(width, patches, patch_size):
    return 2 * patches * width * 3 * patch_size**2


@pytest.fixture(scope='module')
def images():
    """(3, 3, 32, 32) in 0-255."""
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Of a distiller of width 32, depth 3, 4 x 4 patches of 8 px."""
    distiller = build_distiller()
    path = tmp_path_factory.mktemp('run') / 'epoch_1.pth'
    backbone = dict(type='mmhdistill.MaskableVisionTransformer', img_size=32, patch_size=8,
                    arch=dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64))
    text = Config(dict(model=dict(backbone=backbone, data_preprocessor=dict(
        mean=[100.0, 110.0, 120.0], std=[50.0, 55.0, 60.0], bgr_to_rgb=True)))).pretty_text
    torch.save(dict(state_dict=distiller.state_dict(), meta=dict(cfg=text)), path)
    return path, distiller
