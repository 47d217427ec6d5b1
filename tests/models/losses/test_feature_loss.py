import math

import pytest
import torch
from torch.testing import assert_close

from mmhdistill.models import FeatureLoss
from mmhdistill.models.taps import ViTSpec
from mmhdistill.models.vit import encode

from ..conftest import bilinear_matrix, random, random_keep_ids, random_output, tiny_vit

STUDENT = ViTSpec(embed_dims=12, depth=4, num_heads=3, patch_size=8)
TEACHER = ViTSpec(embed_dims=18, depth=6, num_heads=3, patch_size=8, num_extra_tokens=3)
LINEAR = dict(type='mmhdistill.LinearProjector')
MLP = dict(type='mmhdistill.MLPProjector', hidden_channels=10)


def build(**kwargs):
    """A loss with random projector weights and biases, and random features of both models."""
    loss = FeatureLoss(STUDENT, TEACHER, **kwargs)
    for seed, parameter in enumerate(loss.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=seed) / 2)
    return loss


def outputs(loss, keep_ids=None):
    return (random_output(STUDENT, loss.student_taps, keep_ids=keep_ids),
            random_output(TEACHER, loss.teacher_taps, seed=100))


def formula(loss, student, teacher, distance, keep_ids=None, beta=2.0, cls=False, normalize=True):
    """Written out token by token, in float64."""
    if keep_ids is None:
        keep_ids = torch.arange(16).expand(2, -1)
    weights = [parameter.detach().double() for parameter in loss.projector.parameters()]
    terms = []
    for image in range(2):
        pairs = [(1 + row, 3 + patch) for row, patch in enumerate(keep_ids[image].tolist())]
        for ours, theirs in ([(0, 0)] if cls else []) + pairs:
            x, target = student.taps[3, 'features'][image, ours].double(), teacher.taps[5, 'features'][image, theirs]
            target = target.double()
            x = weights[0] @ x + weights[1]
            if len(weights) == 4:
                x = weights[2] @ (x * (1 + torch.erf(x / math.sqrt(2))) / 2) + weights[3]
            if normalize:
                target = (target - target.mean()) / (target.var(correction=0) + 1e-6).sqrt()
            d = (x - target).abs()
            terms.append({
                'smooth_l1': torch.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean(),
                'mse': (d**2).mean(),
                'cosine': 1 - x @ target / (x.norm() * target.norm()),
            }[distance])
    return torch.stack(terms).mean().item()


@pytest.mark.parametrize('projector', [None, LINEAR, MLP])
@pytest.mark.parametrize('keep_ids', [None, random_keep_ids(2, 16, 6)])
@pytest.mark.parametrize('distance', ['smooth_l1', 'cosine', 'mse'])
def test_loss__equals_the_formula(distance, keep_ids, projector):
    loss = build(distance=distance, projector=projector)
    assert len(list(loss.parameters())) == (4 if projector is MLP else 2)
    student, teacher = outputs(loss, keep_ids)
    want = formula(loss, student, teacher, distance, keep_ids)
    assert loss(student, teacher).item() == pytest.approx(want, rel=1e-5)
    assert want > 0.1


@pytest.mark.parametrize('kwargs, changed', [
    (dict(include_cls=True), dict(cls=True)),
    (dict(normalize_target=False), dict(normalize=False)),
    (dict(smooth_l1_beta=0.5), dict(beta=0.5)),
])
@pytest.mark.parametrize('keep_ids', [None, random_keep_ids(2, 16, 6)])
def test_loss__options(kwargs, changed, keep_ids):
    loss = build(**kwargs)
    student, teacher = outputs(loss, keep_ids)
    # A teacher whose features are far from whitened.
    teacher.taps[5, 'features'] = teacher.taps[5, 'features'] * 3 + 1
    got = loss(student, teacher).item()
    assert got == pytest.approx(formula(loss, student, teacher, 'smooth_l1', keep_ids, **changed), rel=1e-5)
    assert abs(got - formula(loss, student, teacher, 'smooth_l1', keep_ids)) > 1e-3


def test_loss__weight_scales_the_value():
    loss = build()
    student, teacher = outputs(loss)
    full = loss(student, teacher).item()
    loss.loss_weight = 0.1
    assert loss(student, teacher).item() == pytest.approx(0.1 * full, rel=1e-6)
    assert build(loss_weight=0.1)(student, teacher).item() == pytest.approx(0.1 * full, rel=1e-6)


def test_loss__gradient_is_the_slope_of_the_value():
    loss = build(projector=MLP, include_cls=True).double()
    keep_ids = random_keep_ids(2, 16, 6)
    student, teacher = outputs(loss, keep_ids)
    teacher.taps[5, 'features'] = teacher.taps[5, 'features'].double()
    features = student.taps[3, 'features'].double()
    student.taps[3, 'features'] = features.requires_grad_()
    tensors = [features, *loss.parameters()]
    grads = torch.autograd.grad(loss(student, teacher), tensors)
    for seed, (tensor, grad) in enumerate(zip(tensors, grads)):
        direction, step = random(*tensor.shape, seed=seed, dtype=torch.float64), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * direction
                values.append(loss(student, teacher).item())
                tensor -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-6)
        assert abs(slope) > 1e-3


def test_loss__perfect_projection_of_a_masked_first_block_is_zero():
    # A one-block model whose block adds nothing through attention is a function of each patch alone.
    vit, images, keep_ids = tiny_vit(depth=1), random(2, 3, 32, 32), random_keep_ids(2, 16, 6)
    with torch.no_grad():
        vit.layers[0].attn.proj.weight.zero_()
        vit.ln1.weight.fill_(1.0)
        vit.ln1.bias.zero_()
    loss = FeatureLoss(vit.spec, vit.spec, include_cls=True)
    torch.nn.init.eye_(loss.projector.proj.weight)
    torch.nn.init.zeros_(loss.projector.proj.bias)
    student = vit.encode(images, loss.student_taps, lambda *_: keep_ids)
    teacher = encode(vit, images, loss.teacher_taps)
    assert loss(student, teacher).item() < 1e-9
    moved = vit.encode(images, loss.student_taps, lambda *_: (keep_ids + 1) % 16)
    moved.keep_ids[0] = keep_ids
    assert loss(moved, teacher).item() > 0.1


@pytest.mark.parametrize('include_cls', [False, True])
@pytest.mark.parametrize('distance', ['smooth_l1', 'cosine'])
def test_loss__teacher_of_another_grid_is_met_by_the_resampled_student(distance, include_cls):
    loss = build(distance=distance, include_cls=include_cls)
    student = random_output(STUDENT, loss.student_taps)
    teacher = random_output(TEACHER, loss.teacher_taps, patches=36, seed=100)
    found = loss(student, teacher).item()
    features = student.taps[3, 'features']
    weights = bilinear_matrix((4, 4), (6, 6)).float()
    student.taps[3, 'features'] = torch.cat([features[:, :1], weights @ features[:, 1:]], dim=1)
    # Written out, every patch has its counterpart at the same place of the 6 x 6 grid.
    everything = torch.arange(36).expand(2, -1)
    want = formula(loss, student, teacher, distance, everything, cls=include_cls)
    assert found == pytest.approx(want, rel=1e-5)
    turned = everything.reshape(2, 6, 6).mT.reshape(2, 36)
    teacher.taps[5, 'features'] = torch.cat([teacher.extra(5, 'features'), teacher.patches(5, 'features', turned)], 1)
    assert abs(formula(loss, student, teacher, distance, everything, cls=include_cls) - want) > 1e-4


def test_loss__dropped_tokens_and_a_teacher_of_another_grid():
    loss = build()
    student, _ = outputs(loss, random_keep_ids(2, 16, 6))
    with pytest.raises(ValueError, match='tokens were dropped, so a grid of 4x4 patches cannot be resampled to one of '
                                         "6x6: leave the teacher's image_size out, or train without a masker"):
        loss(student, random_output(TEACHER, loss.teacher_taps, patches=36))


def test_taps__final_features_of_both():
    loss = build()
    assert loss.student_taps == {3: {'features'}}
    assert loss.teacher_taps == {5: {'features'}}


def test_projector__initial_weights():
    loss = FeatureLoss(ViTSpec(200, 4, 4, 8), ViTSpec(300, 4, 4, 8))
    torch.manual_seed(0)
    loss.init_weights()
    weight, bias = loss.projector.proj.weight, loss.projector.proj.bias
    assert weight.shape == (300, 200)
    assert_close(weight.std(), torch.tensor(0.02), rtol=0.02, atol=0.0)
    assert bias.abs().max() == 0


def test_init__unknown_distance():
    with pytest.raises(ValueError, match="unknown feature distance 'kl': choose smooth_l1, cosine or mse"):
        FeatureLoss(STUDENT, TEACHER, distance='kl')


# Extra tokens, and whether the first is a class token: of the student, then of the teacher.
@pytest.mark.parametrize('student, teacher, named', [((0, True), (1, True), 'student'),
                                                     ((5, True), (0, True), 'teacher'),
                                                     ((1, True), (4, False), 'teacher'),
                                                     ((0, True), (4, False), 'student and the teacher')])
def test_init__include_cls_needs_class_tokens(student, teacher, named):
    specs = [ViTSpec(12, 4, 3, 8, *tokens) for tokens in (student, teacher)]
    message = f'include_cls=True compares class tokens, but the {named} has none: set it to False, or give both a class'
    with pytest.raises(ValueError, match=f'^{message} token.$'):
        FeatureLoss(*specs, include_cls=True)
