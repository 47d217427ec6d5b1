import re

import pytest
import torch
from torch.testing import assert_close

from mmhdistill.models import TokenRelationLoss
from mmhdistill.models.losses.token_relation_loss import default_layer_pairs
from mmhdistill.models.taps import ViTSpec
from mmhdistill.models.vit import encode

from ..conftest import bilinear_matrix, naive_relation, random, random_keep_ids, random_output, tiny_vit

STUDENT = ViTSpec(embed_dims=12, depth=4, num_heads=3, patch_size=8)
TEACHER = ViTSpec(embed_dims=18, depth=6, num_heads=3, patch_size=8)
F64 = torch.float64


def outputs(loss, student=STUDENT, teacher=TEACHER, keep_ids=None):
    ours = random_output(student, loss.student_taps, keep_ids=keep_ids, dtype=F64)
    return ours, random_output(teacher, loss.teacher_taps, seed=100, dtype=F64)


def patches(output, layer, kind, ids=None, extra=0):
    """Rows of the patches ``ids`` of a full image, picked one by one, behind ``extra`` of the extra tokens."""
    x, first = output.taps[layer, kind], output.num_extra_tokens
    if ids is None:
        ids = torch.arange(x.shape[1] - first).expand(len(x), -1)
    rows = [list(range(extra)) + [first + i for i in image] for image in ids.tolist()]
    return torch.stack([torch.stack([x[image, row] for row in rows[image]]) for image in range(len(x))])


def naive(student, teacher, layers, kinds, keep_ids=None, heads=3, extra=0, **kwargs):
    total = 0.0
    for ours, theirs in layers:
        for kind, weight in kinds.items():
            s = [patches(student, ours, part, extra=extra) for part in kind]
            t = [patches(teacher, theirs, part, keep_ids, extra) for part in kind]
            total = total + weight * naive_relation(*s, *t, heads, **kwargs)
    return total


@pytest.mark.parametrize('depths, pairs', [
    ((12, 12), [(8, 8), (9, 9), (10, 10)]),
    ((24, 24), [(17, 17), (19, 19), (21, 21)]),
    ((12, 24), [(8, 17), (9, 19), (10, 21)]),
    ((4, 4), [(2, 2)]),
    ((4, 12), [(2, 8), (2, 9), (2, 10)]),
    ((1, 1), [(0, 0)]),
])
def test_default_layer_pairs__by_depth(depths, pairs):
    assert default_layer_pairs(*depths) == pairs
    student, teacher = (ViTSpec(embed_dims=12, depth=depth, num_heads=3, patch_size=8) for depth in depths)
    assert TokenRelationLoss(student, teacher).layers == pairs


@pytest.mark.parametrize('distance', ['kl', 'smooth_l1'])
@pytest.mark.parametrize('kinds', [['qk'], ['qk', 'vv'], dict(qq=0.5, kk=2.0, vv=0.25, qk=3.0)])
def test_loss__full_images_equal_the_formula(kinds, distance):
    layers = [(1, 2), (3, 5)]
    loss = TokenRelationLoss(STUDENT, TEACHER, layers, kinds, distance)
    student, teacher = outputs(loss)
    weights = kinds if isinstance(kinds, dict) else dict.fromkeys(kinds, 1.0)
    want = naive(student, teacher, layers, weights, distance=distance)
    assert_close(loss(student, teacher), want, rtol=1e-10, atol=0.0)
    assert want > 0.1


@pytest.mark.parametrize('kwargs, formula', [
    ({}, {}),
    (dict(temperature=0.5), dict(temperature=0.5)),
    (dict(distance='smooth_l1'), dict(distance='smooth_l1')),
    (dict(distance='smooth_l1', smooth_l1_beta=0.25), dict(distance='smooth_l1', beta=0.25)),
])
def test_loss__masked_student_selects_rows_and_columns_of_the_teacher(kwargs, formula):
    loss = TokenRelationLoss(STUDENT, TEACHER, [(1, 4), (2, 4)], dict(qk=1.0, vv=0.5), **kwargs)
    keep_ids = random_keep_ids(2, 16, 6)
    student, teacher = outputs(loss, keep_ids=keep_ids)
    want = naive(student, teacher, loss.layers, loss.kinds, keep_ids, **formula)
    assert_close(loss(student, teacher), want, rtol=1e-10, atol=0.0)
    # Other patches of the teacher give another value.
    moved = naive(student, teacher, loss.layers, loss.kinds, (keep_ids + 1) % 16, **formula)
    assert (want - moved).abs() > 1e-3


@pytest.mark.parametrize('distance', ['kl', 'smooth_l1'])
def test_loss__gradient_equals_the_formula(distance):
    loss = TokenRelationLoss(STUDENT, TEACHER, [(1, 4)], ['qk', 'vv'], distance, loss_weight=0.3)
    keep_ids = random_keep_ids(2, 16, 6)
    student, teacher = outputs(loss, keep_ids=keep_ids)
    tensors = [x.requires_grad_() for x in student.taps.values()]
    got = torch.autograd.grad(loss(student, teacher), tensors)
    value = 0.3 * naive(student, teacher, [(1, 4)], loss.kinds, keep_ids, distance=distance)
    want = torch.autograd.grad(value, tensors)
    for g, w in zip(got, want):
        assert_close(g, w, rtol=1e-10, atol=1e-14)
        assert w[:, 1:].abs().max() > 1e-4 and w[:, :1].abs().max() == 0


def test_loss__each_layer_has_its_own_kept_tokens():
    # What `encoder` masking leads to: fewer tokens deeper down.
    loss = TokenRelationLoss(STUDENT, TEACHER, [(0, 1), (2, 3), (3, 5)])
    first, second = random_keep_ids(2, 16, 9), random_keep_ids(2, 16, 4, seed=1)
    student, teacher = outputs(loss)
    for layer, ids in ((2, first), (3, second)):
        student.keep_ids[layer] = ids
        for kind in 'qk':
            student.taps[layer, kind] = student.taps[layer, kind][:, :1 + ids.shape[1]]
    want = sum(naive(student, teacher, [pair], {'qk': 1.0}, ids)
               for pair, ids in zip(loss.layers, (None, first, second)))
    assert_close(loss(student, teacher), want, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize('keep_ids', [None, random_keep_ids(2, 16, 6)])
def test_loss__include_extra(keep_ids):
    spec = ViTSpec(embed_dims=12, depth=4, num_heads=3, patch_size=8, num_extra_tokens=2)
    loss = TokenRelationLoss(spec, spec, [(1, 2)], include_extra=True)
    student, teacher = outputs(loss, spec, spec, keep_ids)
    want = naive(student, teacher, [(1, 2)], {'qk': 1.0}, keep_ids, extra=2)
    assert_close(loss(student, teacher), want, rtol=1e-10, atol=0.0)
    without = naive(student, teacher, [(1, 2)], {'qk': 1.0}, keep_ids)
    assert (want - without).abs() > 1e-3


def test_loss__unequal_extra_tokens_are_left_out():
    registers = ViTSpec(embed_dims=18, depth=6, num_heads=3, patch_size=8, num_extra_tokens=5)
    loss = TokenRelationLoss(STUDENT, registers, [(1, 2)])
    student, teacher = outputs(loss, teacher=registers)
    assert_close(loss(student, teacher), naive(student, teacher, [(1, 2)], {'qk': 1.0}), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize('heads', [1, 2, 6])
def test_loss__relation_heads_bridge_unequal_widths_and_heads(heads):
    teacher_spec = ViTSpec(embed_dims=24, depth=6, num_heads=8, patch_size=8)
    loss = TokenRelationLoss(STUDENT, teacher_spec, [(1, 2)], ['qk', 'vv'], relation_heads=heads)
    student, teacher = outputs(loss, teacher=teacher_spec)
    want = naive(student, teacher, [(1, 2)], {'qk': 1.0, 'vv': 1.0}, heads=heads)
    assert_close(loss(student, teacher), want, rtol=1e-10, atol=0.0)


def test_loss__weight_scales_the_value():
    full, tenth = (TokenRelationLoss(STUDENT, TEACHER, [(1, 2)], loss_weight=weight) for weight in (1.0, 0.1))
    student, teacher = outputs(full)
    assert_close(tenth(student, teacher), 0.1 * full(student, teacher), rtol=1e-12, atol=0.0)


def test_taps__what_the_kinds_need():
    loss = TokenRelationLoss(STUDENT, TEACHER, [(1, 2), (-1, -1), (1, 3)], ['qk'])
    assert loss.layers == [(1, 2), (3, 5), (1, 3)]
    assert loss.student_taps == dict.fromkeys((1, 3), frozenset('qk'))
    assert loss.teacher_taps == dict.fromkeys((2, 5, 3), frozenset('qk'))
    assert TokenRelationLoss(STUDENT, TEACHER, [(1, 2)], ['vv']).teacher_taps == {2: frozenset('v')}
    assert TokenRelationLoss(STUDENT, TEACHER, [(1, 2)], ['kk', 'vv']).student_taps == {1: frozenset('kv')}


@pytest.mark.parametrize('distance', ['kl', 'smooth_l1'])
@pytest.mark.parametrize('include_extra', [False, True])
def test_loss__same_model_same_tokens_is_zero(include_extra, distance):
    vit, images = tiny_vit(), random(2, 3, 32, 32)
    loss = TokenRelationLoss(vit.spec, vit.spec, kinds=['qk', 'vv'], distance=distance, include_extra=include_extra)
    keep_ids = random_keep_ids(2, 16, 6)
    other = encode(tiny_vit(seed=1), images, loss.teacher_taps)
    for reduce in (None, lambda index, _: keep_ids if index == 0 else None):
        student = vit.encode(images, loss.student_taps, reduce)
        same = encode(vit, images, loss.teacher_taps, reduce)
        assert abs(loss(student, same).item()) < 1e-6
        assert loss(student, other).item() > 0.05


@pytest.mark.parametrize('kinds', [['qk'], ['vv', 'qq', 'kk']])
def test_loss__first_layer_of_a_masked_model_fits_its_full_self(kinds):
    # Queries, keys and values of the first layer are made of one token each, so masking does not change them.
    vit, images, keep_ids = tiny_vit(), random(2, 3, 32, 32), random_keep_ids(2, 16, 6)
    first = TokenRelationLoss(vit.spec, vit.spec, [(0, 0)], kinds)
    student = vit.encode(images, first.student_taps, lambda *_: keep_ids)
    assert abs(first(student, encode(vit, images, first.teacher_taps)).item()) < 1e-6
    second = TokenRelationLoss(vit.spec, vit.spec, [(1, 1)], kinds)
    student = vit.encode(images, second.student_taps, lambda index, _: keep_ids if index == 0 else None)
    assert second(student, encode(vit, images, second.teacher_taps)).item() > 1e-3


@pytest.mark.parametrize('distance', ['kl', 'smooth_l1'])
def test_loss__teacher_of_another_grid_is_met_by_the_resampled_student(distance):
    # 14 x 14 patches of 16 px beside 16 x 16 patches of 14 px.
    loss = TokenRelationLoss(STUDENT, TEACHER, [(1, 4)], ['qk', 'vv'], distance)
    student = random_output(STUDENT, loss.student_taps, patches=196, dtype=F64)
    teacher = random_output(TEACHER, loss.teacher_taps, patches=256, seed=100, dtype=F64)
    weights = bilinear_matrix((14, 14), (16, 16))
    resampled = {kind: weights @ student.taps[1, kind][:, 1:] for kind in 'qkv'}
    theirs = {kind: teacher.taps[4, kind][:, 1:] for kind in 'qkv'}
    want = sum(naive_relation(*(resampled[part] for part in kind), *(theirs[part] for part in kind), 3, distance)
               for kind in ('qk', 'vv'))
    assert_close(loss(student, teacher), want, rtol=1e-10, atol=0.0)
    assert want > 0.1


def test_loss__extra_tokens_of_another_grid_are_not_resampled():
    spec = ViTSpec(embed_dims=12, depth=4, num_heads=3, patch_size=8, num_extra_tokens=2)
    loss = TokenRelationLoss(spec, spec, [(1, 2)], include_extra=True)
    student = random_output(spec, loss.student_taps, dtype=F64)
    teacher = random_output(spec, loss.teacher_taps, patches=25, seed=100, dtype=F64)
    weights = torch.block_diag(torch.eye(2, dtype=F64), bilinear_matrix((4, 4), (5, 5)))
    want = naive_relation(*(weights @ student.taps[1, kind] for kind in 'qk'),
                          *(teacher.taps[2, kind] for kind in 'qk'), 3)
    assert_close(loss(student, teacher), want, rtol=1e-10, atol=0.0)


def test_loss__dropped_tokens_and_a_teacher_of_another_grid():
    loss = TokenRelationLoss(STUDENT, TEACHER, [(1, 2)])
    student, _ = outputs(loss, keep_ids=random_keep_ids(2, 16, 6))
    with pytest.raises(ValueError, match='tokens were dropped, so a grid of 4x4 patches cannot be resampled to one of '
                                         "6x6: leave the teacher's image_size out, or train without a masker"):
        loss(student, random_output(TEACHER, loss.teacher_taps, patches=36, dtype=F64))


@pytest.mark.parametrize('kinds, named', [(['qk', 'qv'], "['qv']"), (dict(kq=1.0), "['kq']")])
def test_init__unknown_kinds(kinds, named):
    message = re.escape(f'unknown relation kinds {named}: choose at least one of qk, vv, qq, kk.')
    with pytest.raises(ValueError, match=message):
        TokenRelationLoss(STUDENT, TEACHER, kinds=kinds)


@pytest.mark.parametrize('kinds', [[], {}, dict(qk=0.0, vv=0)])
def test_init__no_kind_with_a_weight(kinds):
    with pytest.raises(ValueError, match=re.escape(f'no relation kind has a weight, got {kinds}: choose at least one')):
        TokenRelationLoss(STUDENT, TEACHER, [(1, 1)], kinds=kinds)


def test_kinds__one_alone():
    assert TokenRelationLoss(STUDENT, STUDENT, [(1, 1)], kinds='vv').kinds == dict(vv=1.0)


def test_kinds__weight_0_reads_nothing():
    loss = TokenRelationLoss(STUDENT, STUDENT, [(1, 1)], kinds=dict(qk=2.0, vv=0.0))
    assert loss.kinds == dict(qk=2.0)
    assert loss.student_taps == loss.teacher_taps == {1: frozenset('qk')}


def test_init__unknown_distance():
    with pytest.raises(ValueError, match="unknown relation distance 'mse': choose kl or smooth_l1"):
        TokenRelationLoss(STUDENT, TEACHER, distance='mse')


@pytest.mark.parametrize('pair, message', [((4, 0), 'layer 4 is out of range for the student, which has 4 layers'),
                                           ((0, 6), 'layer 6 is out of range for the teacher, which has 6 layers'),
                                           ((-5, 0), 'layer -5 is out of range for the student')])
def test_init__layer_out_of_range(pair, message):
    with pytest.raises(ValueError, match=message):
        TokenRelationLoss(STUDENT, TEACHER, [(1, 1), pair])


def test_init__no_layers():
    with pytest.raises(ValueError, match='layers is empty'):
        TokenRelationLoss(STUDENT, TEACHER, [])


@pytest.mark.parametrize('heads', [0, 4, 9, 18])
def test_init__relation_heads_do_not_divide(heads):
    message = re.escape(f'relation_heads={heads} does not divide both widths, 12 (student) and 18 (teacher): choose '
                        'one of [1, 2, 3, 6].')
    with pytest.raises(ValueError, match=message):
        TokenRelationLoss(STUDENT, TEACHER, relation_heads=heads)


def test_init__unequal_heads_need_relation_heads():
    teacher = ViTSpec(embed_dims=18, depth=6, num_heads=6, patch_size=8)
    message = re.escape('the student has 3 heads and the teacher 6: set relation_heads to a common divisor of their '
                        'widths 12 and 18, one of [1, 2, 3, 6].')
    with pytest.raises(ValueError, match=message):
        TokenRelationLoss(STUDENT, teacher)


def test_init__include_extra_needs_equally_many():
    teacher = ViTSpec(embed_dims=18, depth=6, num_heads=3, patch_size=8, num_extra_tokens=5)
    with pytest.raises(ValueError, match='include_extra=True needs .* student has 1 and the teacher 5: set it to'):
        TokenRelationLoss(STUDENT, teacher, include_extra=True)
