"""Values of the transfer recipes, and what the real Runner makes of their schedules."""
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner

import mmhdistill  # noqa: F401  (lets the package's name resolve in configs)

FOLDER = Path(__file__).parents[2] / 'configs/transfer'
CONFIGS = sorted(path.stem for path in FOLDER.glob('*/*.py') if '_knn_' not in path.stem)
VITDET_B, VITDET_L = (dict(lr=1e-4, weight_decay=0.1, layer_decay=rate, drop_path=drop, batch=64)
                      for rate, drop in ((0.7, 0.1), (0.8, 0.4)))
FINETUNE_B = dict(lr=2e-3, weight_decay=0.05, layer_decay=0.65, drop_path=0.1, batch=1024)
LINEAR_B = dict(optimizer='LARS', lr=1.6, momentum=0.9, weight_decay=0, drop_path=0, batch=4096)
# AdamW with betas 0.9 and 0.999 where nothing else is said; no layer decay is one rate for all.
OPTIMIZERS = {
    'vit-b_ft-100e_in1k': FINETUNE_B,
    'vit-b_ft-100e_cifar100': FINETUNE_B,
    'vit-b_ft-100e_inat19': FINETUNE_B,
    'vit-b_ft-100e_cars': {**FINETUNE_B, 'lr': 2.5e-4, 'batch': 128},
    'vit-l_ft-50e_in1k': {**FINETUNE_B, 'layer_decay': 0.75, 'drop_path': 0.2},
    'vit-tiny_ft_cifar10': dict(lr=5e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0, batch=128),
    'vit-tiny_ft_caltech101': dict(lr=5e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0, batch=128),
    'vit-b_linear-100e_in1k': LINEAR_B,
    'vit-b_linear-100e_cifar100': LINEAR_B,
    'vit-b_linear-100e_inat19': LINEAR_B,
    'vit-b_linear-100e_cars': {**LINEAR_B, 'lr': 0.05, 'batch': 128},
    'vit-tiny_linear_cifar10': dict(lr=1e-3, weight_decay=0, drop_path=0, batch=128),
    'vit-tiny_linear_caltech101': dict(lr=1e-3, weight_decay=0, drop_path=0, batch=128),
    'mask-rcnn_vit-b_1x_coco': dict(lr=3e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0.2, batch=32),
    'mask-rcnn_vit-l_1x_coco': dict(lr=2e-4, weight_decay=0.05, layer_decay=0.85, drop_path=0.2, batch=32),
    'mask-rcnn_vitdet-b_lsj-100e_coco': VITDET_B,
    'mask-rcnn_vitdet-l_lsj-100e_coco': VITDET_L,
    'cascade-mask-rcnn_vitdet-b_lsj-100e_coco': VITDET_B,
    'cascade-mask-rcnn_vitdet-l_lsj-100e_coco': VITDET_L,
    'upernet_vit-b_512_160k_ade20k': dict(lr=1e-4, weight_decay=0.05, layer_decay=0.65, drop_path=0.1, batch=16),
    'upernet_vit-l_512_160k_ade20k': dict(lr=1e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0.2, batch=16),
    'upernet_vit-tiny_96x128_camvid': dict(lr=5e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0, batch=8),
    'linear_vit-b_512_ade20k': dict(lr=1e-3, weight_decay=0, drop_path=0, batch=16),
}


def read(name):
    return Config.fromfile(next(FOLDER.glob(f'*/{name}.py')))


def test_recipes__each_is_in_the_table():
    assert sorted(OPTIMIZERS) == CONFIGS


@pytest.mark.parametrize('name', CONFIGS)
def test_optimizer__is_that_of_the_method(name):
    cfg = read(name)
    optimizer = cfg.optim_wrapper.optimizer
    paramwise = cfg.optim_wrapper.get('paramwise_cfg', {})
    found = dict(optimizer=optimizer.type, lr=optimizer.lr, momentum=optimizer.get('momentum'),
                 betas=optimizer.get('betas', (0.9, 0.999)), weight_decay=optimizer.weight_decay,
                 layer_decay=paramwise.get('layer_decay_rate'), drop_path=cfg.model.backbone.get('drop_path_rate', 0),
                 batch=cfg.auto_scale_lr.base_batch_size)
    assert found == {**dict(optimizer='AdamW', momentum=None, betas=(0.9, 0.999), layer_decay=None), **OPTIMIZERS[name]}
    assert (cfg.optim_wrapper.get('constructor') is None) == (found['layer_decay'] is None)
    assert 'clip_grad' not in cfg.optim_wrapper and set(paramwise) <= {'layer_decay_rate'}


# Epochs (or iterations) in all, those of warm-up, the part of the peak rate that it starts from, and what follows as a
# function of the part of it that is over.
def cosine(low):
    return lambda part: low + (1 - low) * (1 + math.cos(math.pi * part)) / 2


def poly(part):
    return 1 - part


def steps(*falls):
    return lambda part: 0.1**sum(part > fall - 1e-9 for fall in falls)


SCHEDULES = {
    '_ft-100e_': (100, 5, 1e-4, cosine(5e-4)),
    '_ft-50e_': (50, 5, 1e-4, cosine(5e-4)),
    'tiny_ft_': (50, 5, 1e-4, cosine(5e-4)),
    '_linear-100e_': (100, 10, 1e-4, cosine(0)),
    'tiny_linear_': (20, 1, 1e-2, cosine(0)),
    '-b_1x_': (12, 500, 1e-3, steps(9 / 12, 11 / 12)),
    '-l_1x_': (12, 1000, 1e-3, steps(9 / 12, 11 / 12)),
    '-b_lsj-100e_': (25, 500, 1e-3, steps(22 / 25, 24 / 25)),
    '-l_lsj-100e_': (25, 1000, 1e-3, steps(22 / 25, 24 / 25)),
    'upernet_vit-b_512_160k': (160000, 1500, 1e-6, poly),
    'upernet_vit-l_512_160k': (160000, 1500, 1e-6, poly),
    'linear_vit-b_512': (40000, 1500, 1e-6, poly),
    'camvid': (8000, 100, 1e-2, poly),
}


class TwoLayers(BaseModel):
    """A ViT whose layers have rates, and a head that learns next to nothing."""

    def __init__(self):
        super().__init__()
        arch = dict(embed_dims=4, num_layers=2, num_heads=1, feedforward_channels=4)
        self.backbone = MODELS.build(dict(
            type='mmpretrain.VisionTransformer', arch=arch, img_size=8, patch_size=8))
        self.head = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.head.weight.square().sum())


class Rates(Hook):
    """Learning rates of each step, of every group."""
    priority = 'VERY_LOW'

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append([group['lr'] for group in runner.optim_wrapper.param_groups])


@pytest.mark.parametrize('name', CONFIGS)
def test_schedule__is_that_of_the_method_for_every_layer(name, tmp_path):
    cfg = read(name)
    (length, warm_up, start, rest), = (value for key, value in SCHEDULES.items() if key in name)
    assert (cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters) == length
    by_epoch = 'max_epochs' in cfg.train_cfg
    detection = 'rcnn' in name
    if not by_epoch:
        # The end of training is that of the schedule: 200 iterations beyond warm-up tell its form.
        length = warm_up + 200
    per_epoch = 120 if detection else 2 if by_epoch else 1
    rates = Rates()
    runner = Runner(
        TwoLayers(), str(tmp_path), train_dataloader=dict(
            batch_size=1, sampler=dict(type='InfiniteSampler' if not by_epoch else 'DefaultSampler', shuffle=False),
            dataset=list(range(per_epoch))),
        train_cfg=dict(by_epoch=True, max_epochs=length) if by_epoch else dict(by_epoch=False, max_iters=length),
        # Mixed precision is a matter of the device, and schedules count iterations.
        optim_wrapper={**{key: value for key, value in cfg.optim_wrapper.items() if key != 'dtype'},
                       'type': 'OptimWrapper', 'accumulative_counts': 1},
        param_scheduler=cfg.param_scheduler, custom_hooks=[rates], log_level='ERROR', experiment_name=tmp_path.name,
        default_scope=cfg.default_scope,
        default_hooks=dict(logger=None, checkpoint=None, timer=None))
    runner.train()
    seen = torch.tensor(rates.seen, dtype=torch.float64)
    total = length * per_epoch
    assert len(seen) == total
    # At each step the layers have the proportions of the first: decay ** 0 to decay ** 3.
    peaks = torch.tensor([group['initial_lr'] for group in runner.optim_wrapper.param_groups], dtype=torch.float64)
    proportions = peaks / peaks.max()
    assert torch.allclose(seen, seen.amax(dim=1, keepdim=True) * proportions, rtol=1e-6, atol=0)
    decay = OPTIMIZERS[name].get('layer_decay', 1.0)
    assert proportions.min().item() == pytest.approx(decay**3, rel=1e-6)
    # Warm-up of detection counts iterations, and that of classification epochs.
    warm = warm_up * (per_epoch if by_epoch and not detection else 1)
    expected = []
    for step in range(total):
        # mmengine's PolyLR ends in the last step, its cosine after it.
        part = step / total if detection else (step - warm) / (total - warm - (not by_epoch))
        # mmengine reaches the peak one step before warm-up ends.
        rising = min(start + (1 - start) * step / (warm - 1), 1.0)
        expected.append(rising if step < warm else rest(part))
    expected = torch.tensor(expected, dtype=torch.float64)
    found = seen.amax(dim=1) / OPTIMIZERS[name]['lr']
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12), (found - expected).abs().max()


LAYER_NORM = dict(type='mmpretrain.LN2d', eps=1e-6)


@pytest.mark.parametrize('size', 'bl')
def test_detection__of_cae(size):
    model = read(f'mask-rcnn_vit-{size}_1x_coco').model
    assert (model.backbone.final_norm, model.backbone.img_size, model.backbone.patch_size) == (False, 224, 16)
    assert [neck.type for neck in model.neck] == ['mmhdistill.DeconvPyramid', 'FPN']
    head = model.roi_head.bbox_head
    assert (head.norm_cfg, head.reg_decoded_bbox) == (dict(type='SyncBN'), True)
    assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)
    assert model.rpn_head.get('num_convs', 1) == 1


@pytest.mark.parametrize('size', 'bl')
@pytest.mark.parametrize('cascade', [False, True])
def test_detection__of_vitdet(size, cascade):
    model = read(f'{"cascade-" * cascade}mask-rcnn_vitdet-{size}_lsj-100e_coco').model
    assert (model.backbone.img_size, model.backbone.patch_size, model.backbone.window_size) == (1024, 16, 14)
    assert {'rel_pos', 'final_norm', 'global_blocks'} & set(model.backbone) == set()
    assert (model.neck.type, model.neck.out_channels, model.neck.num_outs) == ('mmhdistill.SimpleFPN', 256, 5)
    assert model.rpn_head.num_convs == 2
    assert model.roi_head.mask_head.norm_cfg == LAYER_NORM
    heads = model.roi_head.bbox_head if cascade else [model.roi_head.bbox_head]
    assert [head.norm_cfg for head in heads] == [LAYER_NORM] * len(heads)
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert [head.bbox_coder.target_stds for head in heads] == stds[:len(heads)]
    if cascade:
        assert [(head.reg_class_agnostic, head.loss_bbox) for head in heads] == [
            (True, dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0))] * 3
