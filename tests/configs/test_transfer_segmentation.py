"""Segmentation recipes: each starts from a student, learns where it should, and says what its name says."""
import os
import re
import subprocess
import sys
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData

import mmhdistill  # noqa: F401  (lets the package's name resolve in configs)
from tests.helpers import build_distiller, random_images, snapshot, tiny_student, write_camvid

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'configs/transfer/segmentation'
CONFIGS = sorted(path.name for path in FOLDER.glob('*.py'))
UPERNET = [name for name in CONFIGS if name.startswith('upernet')]
LINEAR, CAMVID = 'linear_vit-b_512_ade20k.py', 'upernet_vit-tiny_96x128_camvid.py'
NAME = r'(upernet|linear)_vit-(b|l|tiny)_(\d+)(?:x(\d+))?_(?:(\d+)k_)?(ade20k|camvid)\.py'


def student_of(name):
    """Of the recipe's depth, width 16 and patches of 8 px: 4x4 of them."""
    depth = 24 if 'vit-l' in name else 12
    arch = dict(embed_dims=16, num_layers=depth, num_heads=2, feedforward_channels=32)
    return tiny_student(arch=arch)


def save_checkpoint(name, folder):
    """The checkpoint of a distiller of that student, and the distiller."""
    distiller = build_distiller(
        backbone=student_of(name), teachers=dict(clip=dict(type='mmhdistill.ViTTeacher', checkpoint=None, card=dict(
            name='tiny', embed_dims=16, depth=2, num_heads=2, patch_size=8, img_size=32,
            mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)))),
        masker=None, losses=dict(feature=dict(type='mmhdistill.FeatureLoss', teacher='clip')))
    path = folder / 'epoch_1.pth'
    torch.save(dict(state_dict=distiller.state_dict()), path)
    return path, distiller


def tiny(name, checkpoint=None):
    """The config with that ViT on 64x64 images and narrow heads; layers, classes, rates and drop path are its own."""
    cfg = Config.fromfile(FOLDER / name)
    student = student_of(name)
    cfg.merge_from_dict({
        'model.backbone.arch': dict(student['arch'], _delete_=True),
        'model.backbone.patch_size': 8,
        'model.backbone.img_size': (64, 64),
        'model.backbone.init_cfg': checkpoint and dict(type='Pretrained', checkpoint=f'mmhdistill:{checkpoint}'),
    })
    if name != CAMVID:
        # Images are padded to it.
        cfg.model.data_preprocessor.size = (64, 64)
    if name == LINEAR:
        cfg.model.decode_head.update(in_channels=16, channels=16)
    else:
        cfg.model.neck.embed_dim = 16
        cfg.model.decode_head.update(in_channels=[16] * 4, channels=16)
        cfg.model.auxiliary_head.update(in_channels=16, channels=16)
    return cfg


def build(cfg, seed=0):
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    return revert_sync_batchnorm(model)


def make_batch(classes, seed=0):
    """Two 64x64 images with a label of random classes and an ignored corner."""
    from mmseg.structures import SegDataSample
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(2):
        label = torch.randint(0, classes, (1, 64, 64), generator=generator)
        label[:, :16, :16] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=dict(
            img_shape=(64, 64), ori_shape=(64, 64))))
    return dict(inputs=list(random_images(2, 64, seed) * 60 + 120), data_samples=samples)


def loss_of(model, batch):
    data = model.data_preprocessor(dict(batch), True)
    return model.parse_losses(model(**data, mode='loss'))[0]


def test_configs__are_the_recipes():
    assert CONFIGS == [LINEAR, 'upernet_vit-b_512_160k_ade20k.py', 'upernet_vit-l_512_160k_ade20k.py', CAMVID]


@pytest.mark.parametrize('name', CONFIGS)
def test_config__every_tensor_of_the_student_is_loaded(name, tmp_path):
    path, distiller = save_checkpoint(name, tmp_path)
    backbone, student = build(tiny(name, path)).backbone.state_dict(), distiller.backbone.state_dict()
    assert set(student) == set(backbone)
    # Positions are those of 8x8 patches now, and the class token's stay.
    positions, own = backbone.pop('pos_embed'), student.pop('pos_embed')
    assert (positions.shape, own.shape) == ((1, 65, 16), (1, 17, 16))
    assert torch.equal(positions[:, 0], own[:, 0])
    assert [key for key, x in student.items() if not torch.equal(x, backbone[key])] == []


@pytest.mark.parametrize('name, counted', [
    (LINEAR, [12]), (CAMVID, [4, 6, 8, 12]), ('upernet_vit-b_512_160k_ade20k.py', [4, 6, 8, 12]),
    ('upernet_vit-l_512_160k_ade20k.py', [8, 12, 16, 24])
])
def test_config__features_after_these_layers(name, counted):
    backbone = build(tiny(name)).eval().backbone
    images = random_images(1, 64)
    with torch.no_grad():
        found = backbone(images)
        patches, _ = backbone.patch_embed(images)
        tokens = torch.cat([backbone.cls_token, patches], dim=1) + backbone.pos_embed
        expected = {}
        for number, layer in enumerate(backbone.layers, 1):
            tokens = layer(tokens)
            expected[number] = tokens
        expected[counted[-1]] = backbone.ln1(tokens)
    assert len(found) == len(counted)
    for features, number in zip(found, counted):
        maps = expected[number][:, 1:].transpose(1, 2).reshape(1, 16, 8, 8)
        torch.testing.assert_close(features, maps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', UPERNET)
def test_upernet__everything_learns(name):
    cfg = tiny(name)
    cfg.model.backbone.drop_path_rate = 0.0
    model = build(cfg).train()
    assert model.num_classes == dict(camvid=11, ade20k=150)[re.match(NAME, name)[6]]
    loss = loss_of(model, make_batch(model.num_classes))
    assert torch.isfinite(loss)
    loss.backward()
    assert [key for key, p in model.named_parameters()
            if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize('name', UPERNET)
def test_upernet__rates_fall_from_layer_to_layer(name):
    cfg = tiny(name)
    model = build(cfg)
    lr, decay = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.paramwise_cfg.layer_decay_rate
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(p): key for key, p in model.named_parameters()}
    found = {names[id(p)]: group['lr'] for group in optimizer.param_groups for p in group['params']}
    assert set(found) == set(names.values())
    depth = len(model.backbone.layers)
    for key, rate in found.items():
        layer = depth + 1
        if key.startswith(('backbone.cls_token', 'backbone.pos_embed', 'backbone.patch_embed')):
            layer = 0
        elif inside := re.match(r'backbone\.layers\.(\d+)\.', key):
            layer = int(inside[1]) + 1
        assert rate == pytest.approx(lr * decay**(depth + 1 - layer), rel=1e-12), key
    assert found['backbone.pos_embed'] == pytest.approx(lr * decay**(depth + 1), rel=1e-12)
    assert found['decode_head.conv_seg.weight'] == lr


def test_linear__only_one_convolution_learns(tmp_path):
    cfg = tiny(LINEAR, save_checkpoint(LINEAR, tmp_path)[0])
    model = build(cfg).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    images, before = random_images(2, 64), snapshot(model)
    with torch.no_grad():
        trained, tested = model.backbone(images)[0], model.eval().backbone(images)[0]
        # The mode that is trained in computes what is tested.
        assert torch.equal(trained, tested)
        assert torch.equal(model.train().backbone(images)[0], trained)
        scores = model(images)
        expected = torch.einsum('oc,bchw->bohw', model.decode_head.conv_seg.weight[:, :, 0, 0], trained)
        torch.testing.assert_close(scores, expected + model.decode_head.conv_seg.bias[:, None, None])
    assert torch.isfinite(model.train_step(make_batch(150), wrapper)['loss'])
    assert torch.equal(model.backbone(images)[0], trained)
    after, head = snapshot(model), {'decode_head.conv_seg.weight', 'decode_head.conv_seg.bias'}
    assert {key for key in after if not torch.equal(after[key], before[key])} == head
    assert {key for key, p in model.named_parameters() if p.requires_grad and 'backbone' in key} == set()
    # Nothing but the convolution has weights that could learn.
    assert {key for key, p in model.named_parameters() if 'backbone' not in key} == head


@pytest.mark.parametrize('name', CONFIGS)
def test_config__is_what_its_name_says(name):
    cfg = Config.fromfile(FOLDER / name)
    method, size, height, width, length, data = re.fullmatch(NAME, name).groups()
    arch, channels, decay, drop_path = dict(
        b=('base', 768, 0.65, 0.1), l=('large', 1024, 0.75, 0.2), tiny=('deit-tiny', 192, 0.75, 0.0))[size]
    crop = (int(height), int(width or height))
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == ('mmpretrain.VisionTransformer', arch)
    assert cfg.model.decode_head.in_channels == ([channels] * 4 if method == 'upernet' else channels)
    assert cfg.model.decode_head.num_classes == dict(ade20k=150, camvid=11)[data]
    assert tuple(cfg.model.data_preprocessor.size) == tuple(cfg.model.test_cfg.crop_size) == crop
    cropped = next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == 'RandomCrop')
    assert tuple(cropped.crop_size) == crop
    assert length is None or cfg.train_cfg.max_iters == 1000 * int(length)
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.end, poly.type) == (poly.begin, 'PolyLR')
    # mmengine fills in the end of training.
    assert 'end' not in poly
    assert backbone.init_cfg.checkpoint.startswith('mmhdistill:work_dirs/vit-')
    if method == 'linear':
        assert (backbone.frozen_stages, backbone.drop_path_rate) == (12, 0)
        assert cfg.model.decode_head.dropout_ratio == 0
    else:
        assert backbone.get('drop_path_rate', 0) == drop_path
        assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == decay
    if data == 'ade20k' and method == 'upernet':
        assert (warm_up.end, cfg.auto_scale_lr.base_batch_size) == (1500, 16)
        assert (cfg.optim_wrapper.optimizer.type, cfg.optim_wrapper.optimizer.lr) == ('AdamW', 1e-4)


@pytest.mark.parametrize('name', CONFIGS)
def test_config__base_batch_is_that_of_its_command(name):
    cfg, text = Config.fromfile(FOLDER / name), (FOLDER / name).read_text()
    path = f'configs/transfer/segmentation/{name}'
    command = re.search(rf'^#   (tools/dist_train\.sh|python tools/train\.py) {path}(?: (\d+))?$', text, re.MULTILINE)
    assert int(command[2] or 1) * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('name', CONFIGS)
def test_config__base_by_package_name(name, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = 'mmhdistill::transfer/segmentation/{name}'\nlog_level = 'ERROR'\n")
    cfg, original = Config.fromfile(path), Config.fromfile(FOLDER / name)
    assert (cfg.pop('log_level'), original.pop('log_level')) == ('ERROR', 'INFO')
    assert cfg.to_dict() == original.to_dict()


def test_camvid__labels_and_sizes(tmp_path):
    write_camvid(tmp_path)
    cfg = Config.fromfile(FOLDER / CAMVID)
    for loader in ('train', 'val', 'test'):
        settings = cfg[f'{loader}_dataloader'].dataset
        settings.data_root = str(tmp_path)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            dataset = DATASETS.build(settings)
        assert (len(dataset), len(dataset.metainfo['classes']), len(dataset.metainfo['palette'])) == (2, 11, 11)
        samples = [dataset[0] for _ in range(4)]
        labels = [sample['data_samples'].gt_sem_seg.data for sample in samples]
        assert set(torch.cat([label.unique() for label in labels]).tolist()) == {0, 10, 255}
        # Crops to train; else the image at a quarter of its area and its label at full size.
        assert {tuple(sample['inputs'].shape) for sample in samples} == {(3, 96, 128) if loader == 'train' else
                                                                         (3, 180, 240)}
        assert {tuple(label.shape) for label in labels} == {(1, 96, 128) if loader == 'train' else (1, 360, 480)}


def test_camvid__ignored_pixels_do_not_teach(tmp_path):
    model = build(tiny(CAMVID)).eval()
    batch = make_batch(11)
    whole = loss_of(model, batch)
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data[:] = 255
    assert whole > 1
    assert loss_of(model, batch) == 0


def test_camvid__four_crops_cover_an_image(tmp_path):
    write_camvid(tmp_path, number=1)
    cfg = tiny(CAMVID)
    cfg.test_dataloader.dataset.data_root = str(tmp_path)
    model = build(cfg).eval()
    sizes = []
    model.backbone.register_forward_hook(lambda module, args, output: sizes.append(tuple(args[0].shape)))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        sample = DATASETS.build(cfg.test_dataloader.dataset)[0]
    found = model.test_step(pseudo_collate([sample]))[0]
    assert sizes == [(1, 3, 96, 128)] * 4
    assert found.pred_sem_seg.data.shape == (1, 360, 480)
    # Prediction is the best score of each pixel, at the image's own size.
    assert torch.equal(found.pred_sem_seg.data[0], found.seg_logits.data.argmax(dim=0))


def small_run(folder, checkpoint):
    write_camvid(folder)
    cfg = tiny(CAMVID, checkpoint)
    cfg.merge_from_dict({
        'work_dir': str(folder / 'run'),
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'default_hooks.checkpoint.interval': 2,
        'train_dataloader.batch_size': 2,
        'experiment_name': f'run-{folder.name}',
    })
    cfg.param_scheduler = None
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(folder)
    return cfg


def test_run__trains_and_validates(tmp_path):
    path, _ = save_checkpoint(CAMVID, tmp_path)
    runner = Runner.from_cfg(small_run(tmp_path, path))
    runner.train()
    assert runner.iter == 2
    # Of pixels of two classes.
    assert 0 <= runner.message_hub.get_scalar('val/aAcc').current() <= 100
    assert (tmp_path / 'run/iter_2.pth').is_file()


@pytest.mark.slow
def test_config__in_the_train_py_of_mmseg(tmp_path):
    """Which imports our package only when it reads the config."""
    path, _ = save_checkpoint(CAMVID, tmp_path)
    small_run(tmp_path, path).dump(str(tmp_path / 'mine.py'))
    script = Path(mmseg.__file__).parent / '.mim/tools/train.py'
    done = subprocess.run([sys.executable, str(script), str(tmp_path / 'mine.py')], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'is the checkpoint of a distiller' in done.stdout + done.stderr
    assert (tmp_path / 'run/iter_2.pth').is_file()


def test_metafile__lists_the_configs():
    listed = re.findall(r'Config: configs/transfer/segmentation/(\S+\.py)', (FOLDER / 'metafile.yml').read_text())
    assert sorted(listed) == CONFIGS
    assert 'configs/transfer/segmentation/metafile.yml' in (ROOT / 'model-index.yml').read_text()
