"""Teachers that see images at a size, and so on a grid, of their own."""
import pytest
import torch
import torch.nn.functional as F

from mmhdistill.functional import feature_distance, relation_kl, whiten
from tests.helpers import OTHER, build_distiller, random_images, tiny_teacher, without_gradient

from ..conftest import bilinear_matrix


def teachers(**image_sizes):
    wide = tiny_teacher(name='clip-like', embed_dims=48, pre_norm=True, patch_size=7, img_size=28, **OTHER)
    return {name: {**cfg, 'image_size': image_sizes.get(name)}
            for name, cfg in dict(clip=wide, mae=tiny_teacher(name='mae-like')).items()}


def test_loss__by_hand():
    # 4 x 4 patches of the student beside 6 x 6 of one teacher and 3 x 5 of the other.
    model = build_distiller(teachers=teachers(clip=42, mae=(24, 40)), masker=None)
    images = random_images()
    losses = model(images, mode='loss')
    clip, mae = model.teachers['clip'], model.teachers['mae']

    seen = F.interpolate(images * clip.scale + clip.shift, (42, 42), mode='bicubic', antialias=True)
    target = clip.vit(seen)[0][:, 1:]
    ours = bilinear_matrix((4, 4), (6, 6)).float() @ model.backbone.encode(
        images, {2: frozenset({'features'})}).patches(2, 'features')
    expected = feature_distance(model.losses['feature'].projector(ours), whiten(target), 'smooth_l1', 2.0)
    torch.testing.assert_close(losses['loss/feature'], expected, rtol=1e-5, atol=0)

    taps = {1: frozenset('qk')}
    weights = bilinear_matrix((4, 4), (3, 5)).float()
    student = model.backbone.encode(images, taps)
    seen = F.interpolate(images, (24, 40), mode='bicubic', antialias=True)
    tokens = [weights @ student.patches(1, kind) for kind in 'qk'] + [
        mae(seen, (3, 5), taps).patches(1, kind) for kind in 'qk']
    torch.testing.assert_close(losses['loss/relation'], relation_kl(*tokens, heads=4), rtol=1e-5, atol=0)

    sum(losses.values()).backward()
    assert without_gradient(model) == []


def test_loss__masker_and_a_teacher_of_another_grid():
    # Not the scoring one: the student's dropped tokens have no place in its grid.
    model = build_distiller(teachers=teachers(clip=42))
    with pytest.raises(ValueError, match='a grid of 4x4 patches cannot be resampled to one of 6x6: leave the '
                                         r"teacher's image_size out, or train without a masker \(masker=None, and no "
                                         r'RedundantTokenMasker hook\)\.$'):
        model(random_images(), mode='loss')
    # Dropping nothing, it has.
    model.masker.keep_rate = 1.0
    assert all(x > 0 for x in model(random_images(), mode='loss').values())


# 2x8 patches are as many as the student's.
@pytest.mark.parametrize('size, grid', [(48, '6x6'), ((16, 64), '2x8')])
def test_loss__scoring_teacher_of_another_grid(size, grid):
    model = build_distiller(teachers=teachers(mae=size))
    with pytest.raises(ValueError, match="teacher 'mae' scores the tokens of the student's 4x4 patches, but sees a "
                                         f'grid of its own, {grid}: leave its image_size out'):
        model(random_images(), mode='loss')


def test_init_weights__an_image_size_that_cannot_be_cut_into_patches():
    with pytest.raises(ValueError, match="teacher 'clip' cannot cut images of 40x40 px into patches of 7 px"):
        build_distiller(teachers=teachers(clip=40))
