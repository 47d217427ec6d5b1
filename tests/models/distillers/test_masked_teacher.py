"""A teacher that is fed only the patches that the masker keeps."""
import pytest
import torch

from mmhdistill.functional import gather_patches, relation_kl
from mmhdistill.models.flops import encoder_flops
from mmhdistill.models.vit import embed
from tests.helpers import build_distiller, random_images, tiny_distiller, tiny_teacher

MASKER = dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.8, teacher='clip')


def distiller(**kwargs):
    teachers = tiny_distiller()['teachers']
    return build_distiller(**{
        'teachers': dict(clip=teachers['clip'], mae={**tiny_teacher(name='mae-like'), 'masked': True}),
        'masker': MASKER, **kwargs})


def test_loss__relations_of_a_forward_of_the_kept_patches_alone():
    model = distiller()
    images = random_images()
    found = model(images, mode='loss')['loss/relation']
    student = model.backbone.encode(
        images, model._student_taps, model.masker.reducer(
            2, 16, images.device, model.teachers['clip'](images, (4, 4), model._teacher_taps['clip'])))
    keep_ids = student.keep_ids[0]
    assert keep_ids.shape == (2, 8)
    mae = model.teachers['mae'].vit
    tokens = gather_patches(embed(mae, images, model.teachers['mae']._position)[0], keep_ids, 1)
    total = 0.0
    for layer in range(3):
        q, k, _ = mae.layers[layer].attn.qkv(mae.layers[layer].ln1(tokens)).chunk(3, dim=-1)
        tokens = mae.layers[layer](tokens)
        if (layer, layer) in model.losses['relation'].layers:
            ours = (student.patches(layer, kind) for kind in 'qk')
            total = total + relation_kl(*ours, q[:, 1:], k[:, 1:], heads=4)
    torch.testing.assert_close(found, total)
    # They are not those of the full image.
    model.teachers['mae'].masked = False
    assert not torch.isclose(model(images, mode='loss')['loss/relation'], total, rtol=1e-3)


def test_loss__keep_rate_1_is_the_full_image():
    model, images = distiller(), random_images()
    model.masker.keep_rate = 1.0
    masked = model(images, mode='loss')
    model.teachers['mae'].masked = False
    torch.testing.assert_close(model(images, mode='loss'), masked, rtol=0, atol=0)


def test_receipt__arithmetic_of_the_kept_patches():
    model = distiller()
    mae, taps = model.teachers['mae'], model._teacher_taps['mae']
    kept = encoder_flops(mae.vit.patch_embed, mae.vit.layers, 32, 16, [1 + 8] * 3, taps)
    whole = encoder_flops(mae.vit.patch_embed, mae.vit.layers, 32, 16, [1 + 16] * 3, taps)
    assert model._describe_runs()['mae']['gflops'] == kept / 1e9 < whole / 1e9


@pytest.mark.parametrize('kwargs, message', [
    (dict(masker=None), "teacher 'mae' is masked, but tokens are not dropped: give a masker"),
    (dict(masker=dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder')),
     "'mae' is masked, but tokens are dropped inside the student: set the masker's place to 'input'"),
    (dict(masker={**MASKER, 'teacher': 'mae'}), "with teacher 'mae', which is fed the kept ones alone"),
    (dict(teachers=dict(clip=tiny_teacher(), mae={**tiny_teacher(), 'masked': True, 'image_size': 64})),
     "teacher 'mae' is masked, so it has the student's grid of patches: leave its image_size out"),
])
def test_build__what_a_masked_teacher_needs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        distiller(**kwargs)


def test_loss__masked_teacher_that_no_loss_reads_asks_for_nothing():
    feature = dict(type='mmhdistill.FeatureLoss', teacher='clip')
    assert set(distiller(losses=dict(feature=feature), masker=None)(random_images(), mode='loss')) == {'loss/feature'}
