"""What ``test_relation_triton.py`` runs twice: in Triton's interpreter, on CPU tensors, and natively where CUDA is."""
import logging
import os

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmhdistill.functional import relation, relation_kl, relation_smooth_l1, relation_triton

from .test_relation import LargestTensor, largest_saved

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda'
DISTANCES = [relation_kl, relation_smooth_l1]
HALF = [torch.bfloat16, torch.float16]
# Of values and gradients; the PyTorch path rounds its gradient to half precision, too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@pytest.fixture
def first_use():
    """Kernels are checked and sentences logged once in a process."""
    relation._checked_kernels.cache_clear()
    relation._say.cache_clear()


def draw(*, batch=1, tokens=17, heads=3, dim=8, teacher_dim=20, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [(scale * torch.randn(batch, tokens, heads * width, generator=generator)).to(DEVICE, dtype)
             for width in (dim, dim, teacher_dim, teacher_dim)]
    return [x.requires_grad_(i < 2) for i, x in enumerate(drawn)]


def fused(distance):
    """The kernels behind ``distance``, with no decision before them."""
    kl = distance is relation_kl

    def call(*tokens, heads, temperature=1.0, beta=1.0):
        return relation_triton.relation_distance(*tokens, heads, kl, temperature if kl else beta)

    return call


def value_and_grads(distance, tokens, **kwargs):
    value = distance(*tokens, **kwargs)
    return value, *torch.autograd.grad(value, [x for x in tokens if x.requires_grad])


def by_pytorch(distance, tokens, **kwargs):
    return value_and_grads(distance, tokens, rows=tokens[0].shape[1], **kwargs)


def error(got: Tensor, want: Tensor) -> float:
    """Relative, of the whole tensor; absolute where a tensor of zeros is wanted (a single token's distribution)."""
    assert got.shape == want.shape and got.dtype == want.dtype and torch.isfinite(got).all()
    size = want.double().norm()
    return ((got.double() - want.double()).norm() / (size if size > 1e-5 else 0.05)).item()


def assert_equals_pytorch(distance, tokens, tolerance=None, **kwargs):
    got = value_and_grads(fused(distance), tokens, **kwargs)
    want = by_pytorch(distance, tokens, **kwargs)
    errors = [error(g, w) for g, w in zip(got, want, strict=True)]
    assert max(errors) < (tolerance or TOLERANCE[tokens[0].dtype]), errors
    return got


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('dim, teacher_dim', [(8, 20), (20, 64), (64, 8)])
@pytest.mark.parametrize('tokens, heads', [(1, 3), (5, 1), (17, 3), (33, 1)])
def test_equals_pytorch__float32(tokens, heads, dim, teacher_dim, distance):
    drawn = draw(batch=1 if heads > 1 else 2, tokens=tokens, heads=heads, dim=dim, teacher_dim=teacher_dim)
    value, grad_a, grad_b = assert_equals_pytorch(distance, drawn, heads=heads)
    if tokens > 1:
        assert value > 0.1 and grad_a.abs().max() > 1e-3 and grad_b.abs().max() > 1e-3


# 70 tokens are two tiles of half precision.
@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('batch, tokens, heads, dim, teacher_dim', [(2, 5, 3, 20, 64), (1, 70, 1, 64, 20)])
def test_equals_pytorch__half_precision(batch, tokens, heads, dim, teacher_dim, dtype, distance):
    drawn = draw(batch=batch, tokens=tokens, heads=heads, dim=dim, teacher_dim=teacher_dim, dtype=dtype)
    value, *grads = assert_equals_pytorch(distance, drawn, heads=heads)
    assert value.dtype == torch.float32 and all(g.dtype == dtype for g in grads)


@pytest.mark.parametrize('distance, kwargs', [
    (relation_kl, dict(temperature=0.5)),
    (relation_kl, dict(temperature=3.0)),
    (relation_smooth_l1, dict(beta=0.0)),
    (relation_smooth_l1, dict(beta=0.25)),
    (relation_smooth_l1, dict(beta=4.0)),
])
def test_equals_pytorch__parameters(distance, kwargs):
    changed = assert_equals_pytorch(distance, draw(tokens=33, heads=2), heads=2, **kwargs)
    assert all(error(c, d) > 0.05 for c, d in zip(changed, by_pytorch(distance, draw(tokens=33, heads=2), heads=2)))


@pytest.mark.parametrize('distance', DISTANCES)
def test_equals_pytorch__student_and_teacher_of_different_precision(distance):
    student, teacher = draw(dtype=torch.bfloat16)[:2], draw(seed=1)[2:]
    assert_equals_pytorch(distance, [*student, *teacher], heads=3)
    a, b, *teacher = draw()
    mixed = [a, b.detach().bfloat16().requires_grad_(), teacher[0].half(), teacher[1]]
    got, want = value_and_grads(fused(distance), mixed, heads=3), by_pytorch(distance, mixed, heads=3)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bfloat16]
    assert max(error(g, w) for g, w in zip(got, want)) < 1e-3


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('distance', DISTANCES)
def test_equals_pytorch__large_scores_stay_finite(distance, dtype):
    drawn = draw(dtype=dtype, scale=50.0)
    scores = relation.token_relation(*(x.detach().float() for x in drawn[:2]), 3).abs().max()
    assert scores > 8000  # Ten times exp's range in fp32.
    assert_equals_pytorch(distance, drawn, heads=3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_relation_kl__all_scores_far_below_zero(dtype):
    # exp(0 - largest score) is infinite: nothing past the last token may take part.
    a, b, teacher_a, teacher_b = draw(dtype=dtype)
    with torch.no_grad():
        a += 10
        b -= 10
    assert relation.token_relation(a.float(), b.float(), 3).max() < -100
    # In float32 these scores themselves are rounded by more than 1e-5.
    tolerance = max(5e-5, TOLERANCE[dtype])
    assert_equals_pytorch(relation_kl, [a, b, teacher_a, teacher_b], tolerance, heads=3)
    assert_equals_pytorch(relation_kl, [*draw(dtype=dtype)[:2], a.detach(), b.detach()], tolerance, heads=3)


@pytest.mark.parametrize('distance', DISTANCES)
def test_equal_models_are_at_distance_zero(distance):
    a, b, _, _ = draw()
    for x in value_and_grads(fused(distance), [a, b, a.detach(), b.detach()], heads=3):
        assert x.abs().max() < (1e-8 if x.ndim else 1e-6)


@pytest.mark.parametrize('distance', DISTANCES)
def test_gradient_equals_finite_differences(distance):
    tokens = draw()
    _, *grads = value_and_grads(fused(distance), tokens, heads=3)
    for i, grad in enumerate(grads):
        step = 0.02 * grad / grad.norm()
        ends = [fused(distance)(*[x + sign * step if j == i else x for j, x in enumerate(tokens)], heads=3)
                for sign in (1, -1)]
        slope = (ends[0] - ends[1]).item() / 0.04
        assert slope == pytest.approx(grad.norm().item(), rel=2e-3)


@pytest.mark.parametrize('distance', DISTANCES)
def test_strides(distance):
    qkv, teacher_qkv = (torch.randn(2, 17, 3 * width, generator=torch.Generator().manual_seed(width)).to(DEVICE)
                        for width in (24, 40))
    qkv.requires_grad_()
    q, _, v = qkv.chunk(3, dim=-1)
    # Channels first, then one image for the whole batch.
    first = teacher_qkv[..., 40:80].transpose(1, 2).contiguous().transpose(1, 2)
    for teacher in (teacher_qkv.chunk(3, dim=-1)[1:], (first, first[:1].expand(2, -1, -1))):
        tokens = (q, v, *teacher)
        assert not any(x.is_contiguous() for x in tokens)
        got = torch.autograd.grad(fused(distance)(*tokens, heads=2), qkv, retain_graph=True)[0]
        want = torch.autograd.grad(distance(*tokens, heads=2, rows=17), qkv, retain_graph=True)[0]
        assert error(got, want) < 1e-5
        assert error(fused(distance)(*tokens, heads=2), distance(*tokens, heads=2, rows=17)) < 1e-5


@pytest.mark.parametrize('distance', DISTANCES)
def test_same_tensor_twice_gets_both_gradients(distance):
    v, _, teacher_v, _ = draw()
    tokens = v, v, teacher_v, teacher_v
    values = fused(distance)(*tokens, heads=3), distance(*tokens, heads=3, rows=17)
    got, want = (torch.autograd.grad(value, v)[0] for value in values)
    assert error(got, want) < 1e-5


@pytest.mark.parametrize('distance', DISTANCES)
def test_gradients_where_they_are_asked_for(distance):
    a, b, teacher_a, teacher_b = draw()
    _, grad_a, grad_b = value_and_grads(fused(distance), (a, b, teacher_a, teacher_b), heads=3)
    teacher_a.requires_grad_(), teacher_b.requires_grad_()
    for x, want, tokens in ((a, grad_a, (a, b.detach())), (b, grad_b, (a.detach(), b))):
        value = fused(distance)(*tokens, teacher_a, teacher_b, heads=3)
        # An outer factor, as a loss scale.
        (-1024 * value).backward()
        assert_close(x.grad, -1024 * want, rtol=1e-6, atol=0)
        x.grad = None
    assert teacher_a.grad is None and teacher_b.grad is None
    with torch.no_grad():
        without = fused(distance)(a, b, teacher_a, teacher_b, heads=3)
    assert not without.requires_grad
    assert torch.equal(without, value.detach())


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_overflow_is_not_hidden(distance, bad):
    tokens = draw(heads=1)
    with torch.no_grad():
        tokens[0][0, 3, 2] = bad
    value, grad_a, _ = value_and_grads(fused(distance), tokens, heads=1)
    assert not torch.isfinite(value)
    if distance is relation_kl:
        assert not torch.isfinite(grad_a[0, 3]).any()
    assert torch.isfinite(grad_a[0, 4:]).all()


@pytest.mark.parametrize('distance', DISTANCES)
def test_forms_and_saves_no_score_matrix(distance):
    tokens = draw(batch=2, tokens=32, dim=4, teacher_dim=4)
    inputs, scores = 2 * 32 * 12, 2 * 3 * 32 * 32
    with LargestTensor() as mode:
        fused(distance)(*tokens, heads=3).backward()
    # The interpreter moves inputs as bytes, four to an element.
    assert inputs <= mode.elements <= 4 * inputs < scores
    assert largest_saved(fused(distance), tokens, heads=3) == inputs


@pytest.mark.parametrize('distance', DISTANCES)
def test_autocast_keeps_float32(distance):
    tokens = draw()
    want = value_and_grads(fused(distance), tokens, heads=3)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (tokens[0] @ tokens[1].transpose(1, 2)).dtype == torch.bfloat16
        got = value_and_grads(distance, tokens, heads=3)
    assert got[0].grad_fn.name() == '_FusedRelationDistanceBackward'
    for g, w in zip(got, want):
        assert torch.equal(g, w)


def path(distance, tokens, **kwargs):
    name = distance(*tokens, heads=3, **kwargs).grad_fn.name()
    return {'_FusedRelationDistanceBackward': 'triton', '_RelationDistanceBackward': 'pytorch'}[name]


def test_selection(monkeypatch, caplog, first_use):
    tokens = draw()
    state = torch.get_rng_state()
    assert path(relation_kl, tokens) == path(relation_smooth_l1, tokens) == 'triton'
    assert torch.equal(torch.get_rng_state(), state)
    assert path(relation_kl, tokens, rows=4) == 'pytorch'
    assert path(relation_kl, [x.detach().double().requires_grad_() for x in tokens]) == 'pytorch'
    assert path(relation_kl, [*tokens[:2], *(x.double() for x in tokens[2:])]) == 'pytorch'
    # Queries of seventeen tokens, keys of nine.
    assert path(relation_kl, [x[:, :9] if i % 2 else x for i, x in enumerate(tokens)]) == 'pytorch'
    monkeypatch.setenv('MMHDISTILL_TRITON', '0')
    assert path(relation_kl, tokens) == 'pytorch'
    assert not caplog.records
    monkeypatch.setenv('MMHDISTILL_TRITON', '1')
    with torch.inference_mode():
        relation._checked_kernels.cache_clear()
        relation_kl(*tokens, heads=3)
    assert path(relation_kl, tokens) == 'triton'
    assert not caplog.records


class Sabotaged:
    """A kernel that cannot be compiled, or one of half the gradient."""

    def __init__(self, kernel=None):
        self.kernel = kernel

    def __getitem__(self, grid):
        if self.kernel is None:
            raise RuntimeError('no such instruction\nand a long trace')
        return lambda *args, **kwargs: self.kernel[grid](*args[:-1], args[-1] / 2, **kwargs)


@pytest.mark.parametrize('fault, sentence', [
    ('compile', 'does not work here (no such instruction).'),
    ('wrong', 'does not work here (its result is off by 50%).'),
    ('wide', 'heads of 257 and 20 channels does not work here (relation heads of 257 channels are wider than 256).'),
])
def test_selection__says_once_why_not(fault, sentence, monkeypatch, caplog, first_use):
    tokens = draw(tokens=5, dim=257) if fault == 'wide' else draw()
    if fault != 'wide':
        kernel = None if fault == 'compile' else relation_triton._gradient_kernel
        monkeypatch.setattr(relation_triton, '_gradient_kernel', Sabotaged(kernel))
    with caplog.at_level(logging.WARNING):
        got = [value_and_grads(relation_kl, tokens, heads=3) for _ in range(2)]
    for g, w in zip(got[1], by_pytorch(relation_kl, tokens, heads=3)):
        assert_close(g, w, rtol=1e-6, atol=1e-9)
    said, = (record.getMessage() for record in caplog.records)
    assert said.startswith('Token relations are computed by PyTorch, not by the fused kernel: the ')
    assert said.endswith(sentence)


def test_errors_are_those_of_pytorch():
    a, b, teacher_a, teacher_b = draw()
    with pytest.raises(ValueError, match='5 relation heads do not divide the width 24'):
        relation_kl(a, b, teacher_a, teacher_b, heads=5)
    with pytest.raises(ValueError, match='24 relation heads do not divide the width 60'):
        relation_kl(a, b, teacher_a, teacher_b, heads=24)
    with pytest.raises(ValueError, match=r'same tokens, got \(1, 17\) and \(1, 16\)'):
        relation_kl(a, b, teacher_a[:, 1:], teacher_b[:, 1:], heads=3)


def test_compiled_model():
    a, b, teacher_a, teacher_b = draw(tokens=5)
    weight = torch.eye(24, device=DEVICE).requires_grad_()

    def loss(weight):
        return 2 * relation_kl(a.detach() @ weight, b.detach() @ weight, teacher_a, teacher_b, heads=3)

    want = loss(weight)
    assert want.grad_fn.next_functions[0][0].name() == '_FusedRelationDistanceBackward'
    got = torch.compile(loss, backend='aot_eager')(weight)
    assert_close(got, want, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(x, weight)[0] for x in (got, want)]
    assert error(*grads) < 1e-6
