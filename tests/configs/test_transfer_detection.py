"""Detection recipes: each builds, learns through its backbone at the rates it states, and says what its name says."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

import mmhdistill  # noqa: F401  (lets the package's name resolve in configs)
from mmhdistill.models import ViTDet
from tests.helpers import build_distiller, random_images, without_gradient, write_images

pytestmark = pytest.mark.usefixtures('free_memory')
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'configs/transfer/detection'
CONFIGS = sorted(path.name for path in FOLDER.glob('*.py'))
NAME = r'(cascade-)?mask-rcnn_vit(det)?-([bl])_(1x|lsj-100e)_coco\.py'
SIZE = dict(b=('base', 768, 12), l=('large', 1024, 24))


def tiny(name, depth=12):
    """The config with a ViT of width 32 and patches of 16, and narrow heads."""
    cfg = Config.fromfile(FOLDER / name)
    model, width = cfg.model, 32
    model.backbone.arch = dict(embed_dims=width, num_layers=depth, num_heads=2, feedforward_channels=2 * width)
    model.backbone.init_cfg = None
    for neck in model.neck if isinstance(model.neck, list) else [model.neck]:
        neck.in_channels = [width] * 4 if neck.type == 'FPN' else width
        if 'out_channels' in neck:
            neck.out_channels = 16
    model.rpn_head.update(in_channels=16, feat_channels=16)
    heads = model.roi_head.bbox_head if isinstance(model.roi_head.bbox_head, list) else [model.roi_head.bbox_head]
    for head in heads:
        head.update(in_channels=16, conv_out_channels=16, fc_out_channels=32)
    model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
        extractor.out_channels = 16
    if 'out_indices' in model.backbone:
        model.backbone.out_indices = [0, 1, 2, depth - 1]
    return cfg


def build(cfg, seed=0):
    from mmdet.registry import MODELS
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    return model


def images_of(cfg):
    """The data set of images, inside the one that repeats it."""
    dataset = cfg.train_dataloader.dataset
    return dataset.get('dataset', dataset)


def make_batch(cfg, folder):
    """What the config's own training pipeline makes of two random images with a box and its mask each."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        pipeline = Compose(images_of(cfg).pipeline)
    samples = []
    for index, path in enumerate(write_images(folder, ['0.png', '1.png'], size=128)):
        box = [16.0, 8.0, 112.0, 120.0]
        x1, y1, x2, y2 = box
        instance = dict(bbox=box, bbox_label=7 * index, ignore_flag=0, mask=[[x1, y1, x2, y1, x2, y2, x1, y2]])
        samples.append(pipeline(dict(img_path=str(path), img_id=index, height=128, width=128, instances=[instance])))
    return pseudo_collate(samples)


@pytest.mark.parametrize('name', CONFIGS)
def test_config__is_what_its_name_says(name):
    cfg = Config.fromfile(FOLDER / name)
    cascade, vitdet, size, schedule = re.fullmatch(NAME, name).groups()
    arch, width, depth = SIZE[size]
    assert cfg.model.type == ('CascadeRCNN' if cascade else 'MaskRCNN')
    assert (cfg.model.backbone.type, cfg.model.backbone.arch) == (
        'mmhdistill.ViTDet' if vitdet else 'mmpretrain.VisionTransformer', arch)
    assert cfg.model.backbone.init_cfg.checkpoint == f'mmhdistill:work_dirs/vit-{size}_clip-mae_300e/epoch_300.pth'
    assert (schedule == '1x') == (vitdet is None)
    necks = [cfg.model.neck] if vitdet else cfg.model.neck
    assert all(set(neck.in_channels) == {width} if neck.type == 'FPN' else neck.in_channels == width for neck in necks)
    heads = cfg.model.roi_head.bbox_head if cascade else [cfg.model.roi_head.bbox_head]
    assert [head.type for head in heads] == ['Shared4Conv1FCBBoxHead'] * (3 if cascade else 1)
    optimizer, rate = cfg.optim_wrapper.optimizer, cfg.optim_wrapper.paramwise_cfg.layer_decay_rate
    settings = optimizer.lr, optimizer.weight_decay, rate, cfg.model.backbone.drop_path_rate
    if vitdet:
        assert settings == (1e-4, 0.1, *dict(b=(0.7, 0.1), l=(0.8, 0.4))[size])
        # Four global blocks, the last of each quarter.
        assert 'global_blocks' not in cfg.model.backbone and cfg.model.backbone.window_size == 14
    else:
        assert settings == dict(b=(3e-4, 0.05, 0.75, 0.2), l=(2e-4, 0.05, 0.85, 0.2))[size]
        assert cfg.model.backbone.out_indices == dict(b=[3, 5, 7, 11], l=[7, 11, 15, 23])[size]
    # The student's normalisation.
    images = cfg.model.data_preprocessor
    assert (images.mean, images.std, images.bgr_to_rgb) == (
        [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], True)


@pytest.mark.parametrize('name', CONFIGS)
def test_config__batch_and_length_are_those_of_the_method(name):
    cfg = Config.fromfile(FOLDER / name)
    command = re.search(rf'^#   tools/dist_train\.sh configs/transfer/detection/{name} (\d+)$',
                        (FOLDER / name).read_text(), re.MULTILINE)
    steps = cfg.optim_wrapper.get('accumulative_counts', 1)
    batch = int(command[1]) * cfg.train_dataloader.batch_size * steps
    repeats = cfg.train_dataloader.dataset.get('times', 1)
    warm_up, fall = cfg.param_scheduler
    assert (batch, cfg.train_cfg.max_epochs * repeats) == ((64, 100) if 'lsj' in name else (32, 12))
    assert batch == cfg.auto_scale_lr.base_batch_size
    # Schedulers count iterations, of which several make a step of the optimiser.
    assert (warm_up.type, warm_up.by_epoch, warm_up.end) == (
        'LinearLR', False, (250 if 'lsj' in name else 500) * steps)
    assert [epoch * repeats for epoch in fall.milestones] == ([88, 96] if 'lsj' in name else [9, 11])
    assert (fall.type, fall.by_epoch, fall.end) == ('MultiStepLR', True, cfg.train_cfg.max_epochs)


@pytest.mark.parametrize('name', CONFIGS)
def test_config__image_sizes_are_those_of_the_method(name):
    cfg = Config.fromfile(FOLDER / name)
    train = {step.type: step for step in images_of(cfg).pipeline}
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert cfg.test_dataloader == cfg.val_dataloader
    if 'lsj' in name:
        jitter, crop = train['RandomResize'], train['RandomCrop']
        assert (jitter.scale, jitter.ratio_range, crop.crop_size) == ((1024, 1024), (0.1, 2.0), (1024, 1024))
        assert test['Resize'].scale == (1024, 1024)
    else:
        (whole, ), (first, crop, again) = train['RandomChoice'].transforms
        short = [(side, 1333) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
        assert whole.scales == again.scales == short and first.scales == [(400, 1333), (500, 1333), (600, 1333)]
        assert (crop.crop_type, crop.crop_size) == ('absolute_range', (384, 600))
        assert test['Resize'].scale == (1333, 800)
    assert train['RandomFlip'].prob == 0.5 and train['LoadAnnotations'].with_mask


@pytest.mark.parametrize('name', CONFIGS)
def test_config__learns_through_the_backbone(name, tmp_path):
    cfg = tiny(name, depth=4)
    # A path that is dropped for both images has no gradient.
    cfg.model.backbone.drop_path_rate = 0.0
    if 'vitdet' in name:
        # What 1024 px are to windows of 14 patches, 128 are to windows of 3.
        cfg.merge_from_dict(dict(model=dict(
            data_preprocessor=dict(pad_size_divisor=128),
            backbone=dict(img_size=128, window_size=3, global_blocks=[3]))))
    for step in images_of(cfg).pipeline:
        if step.type == 'RandomChoice':
            step.transforms = [[dict(type='RandomChoiceResize', scales=[(96, 200)], keep_ratio=True)]]
        elif step.type == 'RandomResize':
            step.update(scale=(128, 128), ratio_range=(0.9, 1.5))
        elif step.type == 'RandomCrop':
            step.crop_size = (128, 128)
    model = build(cfg).train()
    data = model.data_preprocessor(make_batch(cfg, tmp_path), True)
    if 'vitdet' in name:
        assert data['inputs'].shape == (2, 3, 128, 128)
        assert model.backbone.windows == [3, 3, 3, None]
    losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total) and total > 0
    assert any('loss_mask' in loss for loss in losses)
    total.backward()
    assert without_gradient(model) == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert [parameter for parameter, p in model.backbone.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize('name', CONFIGS)
def test_config__layers_learn_at_the_stated_rates_inside_the_detector(name):
    cfg = tiny(name)
    model = build(cfg)
    assert cfg.optim_wrapper.dtype == 'float16'  # mmcv's RoIAlign has no kernel for bfloat16
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    of = {id(p): group for group in optimizer.param_groups for p in group['params']}
    lr, rate = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.paramwise_cfg.layer_decay_rate
    for parameter, p in model.named_parameters():
        inner = re.match(r'backbone\.(?:layers\.(\d+)|patch_embed|cls_token|pos_embed)', parameter)
        layer = 13 if inner is None else int(inner[1] or -1) + 1
        assert of[id(p)]['lr'] == pytest.approx(lr * rate**(13 - layer), rel=1e-12), parameter
    assert len(of) == len(list(model.parameters()))


@pytest.mark.parametrize('name', CONFIGS)
def test_config__base_by_package_name(name, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = 'mmhdistill::transfer/detection/{name}'\n"
                    "model = dict(backbone=dict(init_cfg=dict(checkpoint='mmhdistill:mine.pth')))\n")
    cfg, original = Config.fromfile(path), Config.fromfile(FOLDER / name)
    assert cfg.model.backbone.init_cfg.pop('checkpoint') == 'mmhdistill:mine.pth'
    original.model.backbone.init_cfg.pop('checkpoint')
    assert cfg.to_dict() == original.to_dict()
    from mmdet.registry import MODELS
    cfg = tiny(name)
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert type(MODELS.build(cfg.model).backbone).__name__ == original.model.backbone.type.split('.')[1]


# A train.py of mmdet knows nothing of mmhdistill: the config's imports come first, and its bases by path.
STOCK = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
cfg = Config.fromfile(sys.argv[1])
assert 'mmhdistill' in sys.modules
for key in ('train', 'val', 'test'):
    cfg.pop(f'{key}_dataloader'), cfg.pop(f'{key}_cfg')
for key in ('optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator'):
    cfg.pop(key)
cfg.work_dir = sys.argv[2]
runner = Runner.from_cfg(cfg)
runner.model.init_weights()
print('position', runner.model.backbone.pos_embed.double().sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mask-rcnn_vit-b_1x_coco.py', 'mask-rcnn_vitdet-b_lsj-100e_coco.py'])
def test_config__starts_from_a_student_under_a_stock_train_py(name, tmp_path):
    distiller = build_distiller()
    torch.save(dict(state_dict=distiller.state_dict()), tmp_path / 'epoch_1.pth')
    student = distiller.backbone.state_dict()
    expected = student['pos_embed'] if name == 'mask-rcnn_vit-b_1x_coco.py' else student['pos_embed'][:, 1:]
    arch = dict(_delete_=True, embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
    backbone = dict(arch=arch, img_size=32, patch_size=8,
                    init_cfg=dict(checkpoint=f'mmhdistill:{tmp_path / "epoch_1.pth"}'))
    if 'vitdet' not in name:
        backbone['out_indices'] = [0, 1, 2, 2]
    model = dict(backbone=backbone, roi_head=dict(bbox_head=dict(fc_out_channels=32)))
    (tmp_path / 'mine.py').write_text(f'_base_ = {str(FOLDER / name)!r}\nmodel = {model!r}\n')
    done = subprocess.run([sys.executable, '-c', STOCK, 'mine.py', str(tmp_path / 'work')], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    position = float(re.search(r'^position (\S+)$', done.stdout, re.MULTILINE)[1])
    assert position == pytest.approx(expected.double().sum().item(), rel=1e-6)


def test_vitdet__windows_and_positions_are_of_the_size_that_images_are_filled_up_to():
    for name in CONFIGS:
        if 'vitdet' in name:
            cfg = tiny(name)
            model = build(cfg)
            assert isinstance(model.backbone, ViTDet)
            assert model.backbone.patch_resolution == (64, 64)
            assert [index for index, window in enumerate(model.backbone.windows) if window is None] == [2, 5, 8, 11]
            assert cfg.model.data_preprocessor.pad_size_divisor == cfg.model.backbone.img_size == 1024


def test_pyramid__strides_are_those_of_anchors_and_regions():
    for name in CONFIGS:
        cfg = tiny(name, depth=4)
        if 'vitdet' in name:
            cfg.model.backbone.img_size = 64
        model = build(cfg).eval()
        maps = model.extract_feat(random_images(1, 64))
        assert [64 / x.shape[-1] for x in maps] == cfg.model.rpn_head.anchor_generator.strides == [4, 8, 16, 32, 64]
        assert cfg.model.roi_head.bbox_roi_extractor.featmap_strides == [4, 8, 16, 32]


def test_metafile__lists_the_configs():
    listed = re.findall(r'Config: configs/transfer/detection/(\S+\.py)', (FOLDER / 'metafile.yml').read_text())
    assert sorted(listed) == CONFIGS and len(CONFIGS) == 6
    assert 'configs/transfer/detection/metafile.yml' in (ROOT / 'model-index.yml').read_text()
