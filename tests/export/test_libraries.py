"""Every export gives the student's features, by the model of the library that reads it."""
import json
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from mmhdistill.export import TARGETS, export
from tests.helpers import random_images

from .conftest import native_features, student_features

CLIP = dict(pre_norm=True, norm_cfg=dict(type='LN', eps=1e-5),
            layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU')))
SCALED = dict(layer_scale_init_value=0.5)
NO_CLASS = dict(with_cls_token=False, out_type='raw')
TANH = dict(layer_cfgs=dict(act_cfg=dict(type='GELU', approximate='tanh')))
GATED = dict(layer_cfgs=dict(ffn_type='swiglu_fused'))


def check(make, tmp_path, target, size, batch=3, **backbone):
    checkpoint, student = make(**backbone)
    out, _ = export(checkpoint, target, img_size=size)
    images = random_images(batch, size or 32)
    expected, found = student_features(student, images), native_features(target, out, images)
    assert found.shape == expected.shape == (batch, student.num_extra_tokens + ((size or 32) // 8)**2, 32)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize('size', [None, 48])
@pytest.mark.parametrize('target', TARGETS)
def test_export__features_at_the_size_of_training_and_at_another(make, tmp_path, target, size):
    check(make, tmp_path, target, size)


@pytest.mark.parametrize('target', ['torch', 'onnx'])
def test_export__programs_take_a_single_image(make, tmp_path, target):
    check(make, tmp_path, target, None, batch=1)


@pytest.mark.parametrize('target, backbone', [
    ('timm', CLIP), ('timm', SCALED), ('timm', NO_CLASS), ('timm', TANH), ('timm', dict(qkv_bias=False)),
    ('timm', {**CLIP, **SCALED, 'norm_cfg': dict(type='LN', eps=1e-6)}),
    ('huggingface', TANH), ('huggingface', dict(qkv_bias=False)),
    ('huggingface', dict(norm_cfg=dict(type='LN', eps=1e-3), layer_cfgs=CLIP['layer_cfgs'])),
    ('mmpretrain', {**CLIP, **SCALED}), ('mmpretrain', GATED), ('mmpretrain', NO_CLASS),
    ('torch', {**GATED, **SCALED}), ('onnx', {**CLIP, **SCALED}), ('onnx', NO_CLASS),
])
def test_export__other_architectures(make, tmp_path, target, backbone):
    check(make, tmp_path, target, 24, **backbone)


@pytest.mark.parametrize('target', ['timm', 'huggingface'])
def test_export__oblong_images(make, tmp_path, target):
    checkpoint, student = make(img_size=(32, 48))
    out, manifest = export(checkpoint, target)
    images = random_images(2, 48)[:, :, :32]
    assert (native_features(target, out, images) - student_features(student, images)).abs().max() < 1e-5
    assert manifest['image_size'] == [32, 48]


@pytest.mark.parametrize('target, backbone, message', [
    ('huggingface', SCALED, 'huggingface cannot express this student: layer scale. Export it to mmpretrain, timm, '
     'torch or onnx.'),
    ('huggingface', {**CLIP, **SCALED}, 'layer scale, norm before the first block. Export it to mmpretrain, timm, '),
    ('huggingface', GATED, 'gated MLP. Export it to mmpretrain, torch or onnx.'),
    ('huggingface', NO_CLASS, 'ViT without class token. Export it to mmpretrain, timm, torch or onnx.'),
    ('timm', GATED, 'timm cannot express this student: gated MLP. Export it to mmpretrain, torch or onnx.'),
    ('timm', dict(norm_cfg=dict(type='LN', eps=1e-3)),
     r'norms with an eps of 0.001 \(1e-06 or 1e-05 only\). Export it to mmpretrain, huggingface, torch or onnx.'),
    ('timm', dict(layer_cfgs=dict(act_cfg=dict(type='ReLU'))), 'activation ReLU. Export it to mmpretrain, torch or'),
    ('timm', dict(patch_cfg=dict(bias=False)), 'patch_cfg of its own. Export it to mmpretrain, torch or onnx.'),
    ('huggingface', dict(layer_cfgs=[dict(), dict(act_cfg=dict(type='ReLU')), dict()]),
     r'blocks that differ \(a list of layer_cfgs\). Export it to mmpretrain, torch or onnx.'),
    ('huggingface', dict(layer_cfgs=dict(norm_cfg=dict(type='LN', eps=1e-4))),
     'norms other than LayerNorm, or of several eps. Export it to mmpretrain, torch or onnx.'),
])
def test_export__what_a_library_cannot_express_is_refused(make, target, backbone, message):
    checkpoint, _ = make(**backbone)
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        export(checkpoint, target)
    assert sorted(checkpoint.parent.iterdir()) == before


@pytest.mark.parametrize('target', ['timm', 'huggingface'])
def test_export__a_teacher_card_reads_it_back(make, target):
    """The formats are those of teachers: what a student learned, the next one can learn from it."""
    import torch

    from mmhdistill.models import ViTTeacher
    from tests.helpers import IMAGENET, tiny_card
    checkpoint, student = make()
    out, _ = export(checkpoint, target)
    file = out / 'model.safetensors' if out.is_dir() else out
    teacher = ViTTeacher(tiny_card(mlp_ratio=2.0), checkpoint=str(file), input_mean=IMAGENET['mean'],
                         input_std=IMAGENET['std'])
    teacher.load()
    assert all(torch.equal(x, student.state_dict()[name]) for name, x in teacher.vit.state_dict().items())


@pytest.mark.parametrize('target', TARGETS)
def test_export__files_are_readable_like_others(make, target):
    checkpoint, _ = make()
    out, manifest = export(checkpoint, target)
    usual = stat.S_IMODE(checkpoint.stat().st_mode)
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [usual] * len(files)
    assert list(manifest['files']) == [file.name for file in files]
    assert json.loads(out.with_name(out.name + '.json').read_text()) == manifest


@pytest.mark.parametrize('target', ['torch', 'onnx'])
def test_export__programs_tell_no_paths_of_this_machine(make, target):
    checkpoint, _ = make()
    out, _ = export(checkpoint, target)
    content = out.read_bytes()
    if target == 'torch':
        with zipfile.ZipFile(out) as archive:
            content = b''.join(archive.read(name) for name in archive.namelist())
    assert b'cls_token' in content
    for folder in (Path(__file__).parents[2], sys.prefix, sys.base_prefix):
        assert str(folder).encode() not in content
