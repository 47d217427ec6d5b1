import pytest
import torch
import torch.nn.functional as F

from mmhdistill.functional import whiten
from mmhdistill.models import MaskedFeatureLoss
from mmhdistill.models.taps import ViTSpec
from tests.helpers import build_distiller, random_images, randomise, tiny_teacher, without_gradient

from ..conftest import random_keep_ids, random_output

STUDENT, TEACHER = ViTSpec(12, 4, 3, 8), ViTSpec(20, 6, 4, 8, num_extra_tokens=2)
DECODER = dict(type='mmhdistill.MaskDecoder', embed_dims=16, num_heads=4)
MASKER = dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.25,
              scorer=dict(type='mmhdistill.RandomScorer'))
KEPT = random_keep_ids(2, 16, 5)


def build(**kwargs):
    torch.manual_seed(0)
    loss = MaskedFeatureLoss(STUDENT, TEACHER, **{**dict(decoder=DECODER), **kwargs})
    loss.init_weights()
    return randomise(loss)


def outputs(loss, keep_ids=KEPT, patches=16):
    return (random_output(STUDENT, loss.student_taps, keep_ids=keep_ids),
            random_output(TEACHER, loss.teacher_taps, patches=patches, seed=100))


def by_hand(loss, student, teacher, distance):
    """Dropped patch by dropped patch."""
    prediction = loss.projector(student.extra(3, 'features'), student.patches(3, 'features'), KEPT, (4, 4))
    target, values = teacher.taps[5, 'features'][:, 2:], []
    for image in range(2):
        for place in set(range(16)) - set(KEPT[image].tolist()):
            p, t = prediction[image, place], whiten(target[image, place])
            if distance == 'cosine':
                values.append(1 - F.cosine_similarity(p, t, dim=0))
            elif distance == 'mse':
                values.append((p - t).square().mean())
            else:
                d = (p - t).abs()
                values.append(torch.where(d < 2, d**2 / 4, d - 1).mean())
    assert len(values) == 22
    return torch.stack(values).mean().item()


@pytest.mark.parametrize('distance', ['smooth_l1', 'cosine', 'mse'])
def test_loss__by_hand(distance):
    loss = build(distance=distance, loss_weight=0.5)
    student, teacher = outputs(loss)
    assert loss(student, teacher).item() == pytest.approx(0.5 * by_hand(loss, student, teacher, distance), rel=1e-5)


def test_loss__looks_at_dropped_patches_of_the_teacher_alone():
    loss = build()
    student, teacher = outputs(loss)
    before = loss(student, teacher).item()
    features = teacher.taps[5, 'features']
    for image, ids in enumerate(KEPT):
        features[image, 2 + ids] += torch.randn(5, 20)
    features[:, :2] += 1.0
    assert loss(student, teacher).item() == before
    features[0, 2 + min(set(range(16)) - set(KEPT[0].tolist()))] *= -1.0
    assert abs(loss(student, teacher).item() - before) > 1e-3


def test_loss__order_of_the_kept_patches_does_not_matter():
    loss = build()
    student, teacher = outputs(loss)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    turned, _ = outputs(loss, KEPT[:, order])
    turned.taps[3, 'features'] = student.taps[3, 'features'][:, [0, *(1 + order).tolist()]]
    assert loss(turned, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-6)


def test_loss__gradient_reaches_the_student_and_the_mask_token():
    loss = build()
    student, teacher = outputs(loss)
    features = student.taps[3, 'features'].requires_grad_()
    loss(student, teacher).backward()
    assert features.grad.abs().amax(-1).min() > 1e-7
    assert loss.projector.mask_token.grad.abs().max() > 1e-5
    assert without_gradient(loss) == []


def test_loss__without_a_masker():
    loss = build()
    with pytest.raises(ValueError, match=r"^MaskedFeatureLoss predicts the patches that the student did not see, and "
                                         r"it saw all of them: give the model a masker with a keep rate below 1, .*"
                                         r"scorer=dict\(type='mmhdistill\.RandomScorer'\)\)\.$"):
        loss(*outputs(loss, None))


@pytest.mark.parametrize('side, grid', [(6, '6x6'), (3, '3x3')])
def test_loss__teacher_of_another_grid(side, grid):
    # Of the larger one, the dropped ids would be other places.
    loss = build()
    with pytest.raises(ValueError, match=f'^tokens were dropped, so a grid of {side}x{side} patches cannot be '
                                         "resampled to one of 4x4: leave the teacher's image_size out"):
        loss(*outputs(loss, patches=side**2))


def test_init__class_tokens_are_not_compared():
    with pytest.raises(TypeError, match="unexpected keyword argument 'include_cls'"):
        build(include_cls=True)


@pytest.mark.parametrize('teacher', [{}, dict(image_size=48)])
def test_distiller__trains_with_masking_and_refuses_a_grid_of_the_teachers_own(teacher):
    losses = dict(masked=dict(type='mmhdistill.MaskedFeatureLoss', teacher='clip', decoder=DECODER))
    teachers = dict(clip={**tiny_teacher(embed_dims=48), **teacher})
    model = build_distiller(losses=losses, masker=MASKER, teachers=teachers)
    if teacher:
        with pytest.raises(ValueError, match='a grid of 6x6 patches cannot be resampled to one of 4x4'):
            model(random_images(), mode='loss')
        return
    model(random_images(), mode='loss')['loss/masked'].backward()
    assert without_gradient(model) == []
    mask_token = model.losses['masked'].projector.mask_token
    assert mask_token.grad.abs().max() > 0
    # A quarter of 16 patches is seen.
    torch.manual_seed(0)
    found = [model(random_images(), mode='loss')['loss/masked'].item() for _ in range(2)]
    assert found[0] != found[1]


def test_distiller__without_a_masker():
    losses = dict(masked=dict(type='mmhdistill.MaskedFeatureLoss', teacher='clip', decoder=DECODER))
    model = build_distiller(losses=losses, masker=None)
    with pytest.raises(ValueError, match='^MaskedFeatureLoss predicts the patches that the student did not see'):
        model(random_images(), mode='loss')
    # The masker of the message.
    model = build_distiller(losses=losses, masker=MASKER)
    assert model(random_images(), mode='loss')['loss/masked'].item() > 0
