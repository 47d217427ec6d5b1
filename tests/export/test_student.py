import json
import re

import pytest
import torch

from mmhdistill.export import export, load_student
from tests.helpers import IMAGENET, log_messages, random_images, tiny_student

from .conftest import student_features


def test_load_student__config_beats_that_of_the_checkpoint(make, tmp_path):
    checkpoint, student = make(meta=dict(cfg='model = dict(backbone=dict(type="ResNet"))', epoch=3, iter=9))
    config = tmp_path / 'my_method.py'
    config.write_text(f'model = dict(backbone={tiny_student()!r})\ndata_preprocessor = dict(type="X", to_rgb=True, '
                      'mean=[1, 2, 3], std=[4, 5, 6])')
    loaded = load_student(checkpoint, str(config))
    assert (loaded.mean, loaded.std) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert {key: loaded.origin[key] for key in ('method', 'epochs', 'iterations', 'teachers')} == dict(
        method='my_method', epochs=3, iterations=9, teachers=None)
    images = random_images()
    assert torch.equal(loaded.vit(images)[0], student_features(student, images))


def test_load_student__settings_of_training_are_left_out(make):
    checkpoint, student = make(drop_path_rate=0.5, drop_rate=0.5, frozen_stages=1, out_type='featmap', out_indices=[0],
                               init_cfg=dict(type='Xavier', layer='Linear'), layer_cfgs=dict(drop_path_rate=0.5))
    loaded = load_student(checkpoint)
    assert set(loaded.backbone) == {'type', 'out_type', 'arch', 'img_size', 'patch_size', 'layer_cfgs'}
    images = random_images()
    expected = student_features(student, images)
    assert torch.equal(loaded.vit(images)[0], expected) and torch.equal(loaded.vit(images)[0], expected)


def test_load_student__weights_of_half_precision(make):
    checkpoint, student = make()
    content = torch.load(checkpoint, weights_only=True)
    content['state_dict'] = {name: x.half() for name, x in content['state_dict'].items()}
    torch.save(content, checkpoint)
    for name, x in load_student(checkpoint).vit.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, student.state_dict()[name].half().float())


@pytest.mark.parametrize('given, warned', [(dict(bgr_to_rgb=True), 0), (dict(to_rgb=True), 0), ({}, 1)])
def test_load_student__channels_left_as_loaded_are_told(make, given, warned):
    checkpoint, _ = make(preprocessor=dict(type='ImgDataPreprocessor', **IMAGENET, **given))
    with log_messages() as messages:
        load_student(checkpoint)
    assert sum('the student expects BGR' in message for message in messages) == warned


def changed(checkpoint, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)


def teacher_file(content):
    content['state_dict'] = {name.replace('backbone.layers', 'blocks').replace('backbone.patch_embed.projection',
                                                                               'patch_embed.proj'): x
                             for name, x in content['state_dict'].items() if name.startswith('backbone')}


def diverged(content):
    content['state_dict']['backbone.ln1.weight'][3] = float('nan')


@pytest.mark.parametrize('change, message', [
    (teacher_file, 'holds a ViT in timm format, as teachers do, and not a student'),
    (lambda content: content['state_dict'].update({'rpn_head.conv.weight': torch.ones(1)}),
     r'the checkpoint of a detector or segmentor \(it has rpn_head\)'),
    (lambda content: content.pop('meta'), 'epoch_2.pth keeps no config, as checkpoints of a Runner do, so the '
     'architecture of its student is unknown: give the config of its run as --config.'),
    (lambda content: content['meta'].update(cfg='model = <class>'), 'the config in .*epoch_2.pth is no config that'),
    (lambda content: content['meta'].update(cfg='x = 1'), 'has no model.backbone: give the config'),
    (lambda content: content['meta'].update(cfg='model = dict(backbone=dict(type="mmpretrain.BEiTViT"))'),
     "has a backbone of type 'mmpretrain.BEiTViT': expected a student"),
    (lambda content: content['meta'].update(cfg=content['meta']['cfg'].replace('img_size=32', 'img_size=64')),
     r'does not fit the backbone of the config in .*: 1 of another shape \(pos_embed is \(1, 17, 32\) instead of '
     r'\(1, 65, 32\)\)'),
    (lambda content: content['meta'].update(cfg=content['meta']['cfg'].replace('num_layers=3', 'num_layers=2')),
     r'12 unexpected \(layers.2.attn.proj.bias, '),
    (lambda content: content['meta'].update(cfg=content['meta']['cfg'].replace('img_size=32', 'img_size=36')),
     'images of 36x36 pixels cannot be cut into patches of 8x8'),
    (lambda content: content['meta'].update(cfg=content['meta']['cfg'].replace(
        "type='mmhdistill.MaskableVisionTransformer'", "type='VisionTransformer', final_norm=False")),
     "without the final norm .* give the distiller's checkpoint."),
    (lambda content: content['meta'].update(cfg=re.sub(r'mean=\[[^]]*\]', 'mean=None', content['meta']['cfg'])),
     'does not say how images are normalised: give data_preprocessor a mean and std'),
    (lambda content: content['meta'].update(cfg=re.sub(r'mean=\[[^]]*\]', 'mean=[.4, .5, .6]', content['meta']['cfg'])),
     'as for images in 0-1'),
    (diverged, r'holds a student that is not finite \(ln1.weight\): its run diverged'),
])
def test_load_student__refuses(make, change, message):
    checkpoint, _ = make()
    changed(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load_student(checkpoint)


@pytest.mark.parametrize('size, backbone, message', [
    (44, {}, 'images of 44x44 pixels cannot be cut into patches of 8x8: choose an image size that is a multiple'),
    (4, {}, 'images of 4x4 pixels cannot be cut into patches'),
    (0, {}, 'images of 0x0 pixels cannot be cut into patches'),
    (-8, {}, 'images of -8x-8 pixels cannot be cut into patches'),
    (48, dict(interpolate_mode='bilinear'), "resamples positions by 'bilinear', and an export for another image size"),
])
def test_at__refuses(make, size, backbone, message):
    checkpoint, _ = make(**backbone)
    with pytest.raises(ValueError, match=message):
        export(checkpoint, 'mmpretrain', img_size=size)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ['epoch_2.pth']


def test_load_student__origin(make):
    import hashlib
    checkpoint, _ = make()
    receipts = dict(mae=dict(name='mae', model='mae-vit-b-p16', sha256='ab' * 32, licence='CC-BY-NC 4.0',
                             role='teacher', source='/home/me/mae.pth', unused=[]))
    changed(checkpoint, lambda content: content.update(teachers=receipts))
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert json.loads(json.dumps(load_student(checkpoint).origin)) == dict(
        method='tiny', epochs=2, iterations=8, checkpoint=dict(file='epoch_2.pth', sha256=digest),
        teachers=dict(mae=dict(model='mae-vit-b-p16', sha256='ab' * 32, licence='CC-BY-NC 4.0', role='teacher')))
