import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmhdistill.functional import relation, relation_kl, relation_smooth_l1, split_heads, token_relation

B, N, H, C, TC = 2, 7, 3, 12, 18
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def naive_kl(a, b, teacher_a, teacher_b, *, heads, temperature=1.0):
    log_p = (token_relation(a, b, heads) / temperature).log_softmax(dim=-1)
    t = (token_relation(teacher_a, teacher_b, heads) / temperature).softmax(dim=-1)
    return F.kl_div(log_p, t, reduction='none').sum(dim=-1).mean()


def naive_smooth_l1(a, b, teacher_a, teacher_b, *, heads, beta=1.0):
    difference = (token_relation(a, b, heads) - token_relation(teacher_a, teacher_b, heads)).abs()
    quadratic = difference**2 / (2 * beta) if beta else difference
    return torch.where(difference < beta, quadratic, difference - beta / 2).mean()


def random_tokens(dtype=torch.float64, scale=1.0, seed=0, tokens=N):
    generator = torch.Generator().manual_seed(seed)
    widths = (C, C, TC, TC)
    drawn = [scale * torch.randn(B, tokens, width, generator=generator, dtype=torch.float64) for width in widths]
    a, b, teacher_a, teacher_b = (x.to(dtype) for x in drawn)
    return a.requires_grad_(), b.requires_grad_(), teacher_a, teacher_b


def value_and_grads(distance, tokens, **kwargs):
    value = distance(*tokens, **kwargs)
    return value, *torch.autograd.grad(value, tokens[:2])


DISTANCES = [
    (relation_kl, naive_kl, {}),
    (relation_kl, naive_kl, dict(temperature=0.5)),
    (relation_kl, naive_kl, dict(temperature=3.0)),
    (relation_smooth_l1, naive_smooth_l1, {}),
    (relation_smooth_l1, naive_smooth_l1, dict(beta=0.25)),
    (relation_smooth_l1, naive_smooth_l1, dict(beta=0.0)),
]
PAIRS = [DISTANCES[0], DISTANCES[3]]


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('distance, naive, kwargs', DISTANCES)
def test_relation__equals_naive_formula(distance, naive, kwargs, dtype):
    tokens = random_tokens(dtype)
    got = value_and_grads(distance, tokens, heads=H, **kwargs)
    want = value_and_grads(naive, tokens, heads=H, **kwargs)
    for g, w in zip(got, want):
        assert g.dtype == dtype
        assert_close(g, w, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 100)
    assert got[0] > 0.05
    assert all(g.abs().max() > 1e-3 for g in got[1:])


@pytest.mark.parametrize('distance, kwargs', [(d, kwargs) for d, _, kwargs in DISTANCES])
def test_relation__gradcheck(distance, kwargs):
    a, b, teacher_a, teacher_b = random_tokens(tokens=4)

    def call(a, b):
        return distance(a, b, teacher_a, teacher_b, heads=H, rows=3, **kwargs)

    assert torch.autograd.gradcheck(call, (a, b))


@pytest.mark.parametrize('distance', [relation_kl, relation_smooth_l1])
def test_relation__gradient_scales_with_the_outer_factor(distance):
    tokens = random_tokens()
    once = value_and_grads(distance, tokens, heads=H)
    scaled = value_and_grads(lambda *args, **kwargs: -3 * distance(*args, **kwargs), tokens, heads=H)
    for g, w in zip(scaled, once):
        assert_close(g, -3 * w, rtol=1e-12, atol=1e-15)


def test_relation_kl__by_hand():
    # Four channels, one of them used: the scale is 1/2. Student scores [[0, 1], [0, 2]], teacher [[0, -1], [0, .5]].
    def column(*values):
        return F.pad(torch.tensor(values, dtype=torch.float64).view(1, -1, 1), (0, 3))

    a, b = column(2.0, 4.0).requires_grad_(), column(0.0, 1.0).requires_grad_()
    value, grad_a, grad_b = value_and_grads(relation_kl, (a, b, column(-2.0, 1.0), column(0.0, 1.0)), heads=1)

    p = [math.exp(s) / (1 + math.exp(s)) for s in (1.0, 2.0)]
    t = [math.exp(s) / (1 + math.exp(s)) for s in (-1.0, 0.5)]
    rows = [t[i] * math.log(t[i] / p[i]) + (1 - t[i]) * math.log((1 - t[i]) / (1 - p[i])) for i in (0, 1)]
    assert value.item() == pytest.approx(sum(rows) / 2, rel=1e-12)
    # d value / d score_i1 = (p_i - t_i) / 2 queries, d score / d a = b / 2.
    d = [(p[i] - t[i]) / 2 for i in (0, 1)]
    assert grad_a[0, :, 0].tolist() == pytest.approx([d[0] / 2, d[1] / 2], rel=1e-12)
    assert grad_b[0, :, 0].tolist() == pytest.approx([-(d[0] * 2 + d[1] * 4) / 2, (d[0] * 2 + d[1] * 4) / 2], rel=1e-12)


def test_relation_smooth_l1__by_hand():
    a = torch.tensor([[[2.0], [4.0]]], dtype=torch.float64)
    b = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    # Scores [[0, 2], [0, 4]] against [[0, 1.5], [0, 1]]: |difference| 0, .5, 0, 3.
    teacher_a = torch.tensor([[[1.5], [1.0]]], dtype=torch.float64)
    value = relation_smooth_l1(a, b, teacher_a, b, heads=1, beta=1.0)
    assert value.item() == pytest.approx((0.5**2 / 2 + 3 - 0.5) / 4, rel=1e-12)


@pytest.mark.parametrize('distance', [relation_kl, relation_smooth_l1])
def test_relation__relation_heads_equal_a_loop_over_heads(distance):
    a, b, teacher_a, teacher_b = random_tokens()
    total = 0.0
    for h in range(H):
        q, k = (x[..., h * C // H:(h + 1) * C // H] for x in (a, b))
        tq, tk = (x[..., h * TC // H:(h + 1) * TC // H] for x in (teacher_a, teacher_b))
        scores = q @ k.transpose(1, 2) / math.sqrt(C // H)
        teacher = tq @ tk.transpose(1, 2) / math.sqrt(TC // H)
        if distance is relation_kl:
            t = teacher.softmax(-1)
            total += (t * (t.log() - scores.softmax(-1).log())).sum(-1).mean() / H
        else:
            total += F.smooth_l1_loss(scores, teacher) / H
    got = value_and_grads(distance, (a, b, teacher_a, teacher_b), heads=H)
    for g, w in zip(got, (total, *torch.autograd.grad(total, (a, b)))):
        assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize('rows', [1, 3, N, N + 5])
@pytest.mark.parametrize('distance', [relation_kl, relation_smooth_l1])
def test_relation__block_size_changes_nothing(distance, rows, dtype, tolerance):
    tokens = random_tokens(dtype)
    want = value_and_grads(distance, tokens, heads=H)
    got = value_and_grads(distance, tokens, heads=H, rows=rows)
    for g, w in zip(got, want):
        assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('distance, naive', [pair[:2] for pair in PAIRS])
def test_relation__same_tensor_twice_gets_both_gradients(distance, naive):
    v, _, teacher_v, _ = random_tokens()
    value = distance(v, v, teacher_v, teacher_v, heads=H, rows=2)
    want = naive(v, v, teacher_v, teacher_v, heads=H)
    grad, = torch.autograd.grad(value, v)
    assert_close(value, want, rtol=1e-10, atol=1e-12)
    assert_close(grad, torch.autograd.grad(want, v)[0], rtol=1e-10, atol=1e-12)
    apart = value_and_grads(distance, (v, v.detach().clone().requires_grad_(), teacher_v, teacher_v), heads=H)
    assert_close(grad, apart[1] + apart[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('distance, naive', [pair[:2] for pair in PAIRS])
def test_relation__half_precision_is_promoted(distance, naive, dtype):
    half = random_tokens(dtype, scale=50.0)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in half]
    value, *grads = value_and_grads(distance, half, heads=H)
    want, *want_grads = value_and_grads(naive, exact, heads=H)
    assert value.dtype == torch.float32
    assert_close(value.double(), want, rtol=1e-6, atol=0.0)
    for g, w in zip(grads, want_grads):
        assert g.dtype == dtype
        assert torch.isfinite(g).all()
        assert_close(g.double(), w, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize('distance', [relation_kl, relation_smooth_l1])
def test_relation__autocast_keeps_float32(distance):
    tokens = random_tokens(torch.float32)
    want = value_and_grads(distance, tokens, heads=H)
    with torch.autocast('cpu', torch.bfloat16):
        assert (tokens[0] @ tokens[1].transpose(1, 2)).dtype == torch.bfloat16
        got = value_and_grads(distance, tokens, heads=H)
    for g, w in zip(got, want):
        assert_close(g, w, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize('distance', [relation_kl, relation_smooth_l1])
def test_relation__teacher_gets_no_gradient(distance):
    a, b, teacher_a, teacher_b = random_tokens()
    want = value_and_grads(distance, (a, b, teacher_a, teacher_b), heads=H)
    teacher_a.requires_grad_(), teacher_b.requires_grad_()
    distance(a, b, teacher_a, teacher_b, heads=H).backward()
    assert teacher_a.grad is None and teacher_b.grad is None
    assert_close(a.grad, want[1], rtol=0.0, atol=0.0)
    assert_close(b.grad, want[2], rtol=0.0, atol=0.0)


def test_relation__one_side_alone_may_need_a_gradient():
    tokens = random_tokens()
    _, want, _ = value_and_grads(relation_kl, tokens, heads=H)
    frozen = (tokens[0], tokens[1].detach(), *tokens[2:])
    assert_close(torch.autograd.grad(relation_kl(*frozen, heads=H), tokens[0])[0], want, rtol=1e-12, atol=1e-15)


def test_relation__equal_models_are_at_distance_zero():
    a, b, _, _ = random_tokens()
    for distance in (relation_kl, relation_smooth_l1):
        value, grad_a, grad_b = value_and_grads(distance, (a, b, a.detach(), b.detach()), heads=H)
        assert abs(value.item()) < 1e-14
        assert max(grad_a.abs().max(), grad_b.abs().max()) < 1e-14


def largest_saved(distance, tokens, **kwargs):
    """Elements of the largest tensor that a forward keeps for its backward."""
    saved = []

    def pack(x):
        saved.append(x.untyped_storage().nbytes() // x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = distance(*tokens, **kwargs)
    # The hooks see what went through save_for_backward; a tensor kept as an attribute of the node would escape them.
    kept = [x.numel() for x in getattr(value.grad_fn, '__dict__', {}).values() if isinstance(x, torch.Tensor)]
    return max(saved + kept)


@pytest.mark.parametrize('distance, naive', [pair[:2] for pair in PAIRS])
def test_relation__saves_no_score_matrix(distance, naive):
    tokens, per_token = random_tokens(torch.float32, tokens=64), B * 64 * TC
    assert largest_saved(naive, tokens, heads=H) >= B * H * 64 * 64
    assert largest_saved(distance, tokens, heads=H) <= per_token < B * H * 64 * 64


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(made + [self.elements])
        return out


@pytest.mark.parametrize('distance, naive', [pair[:2] for pair in PAIRS])
def test_relation__forms_no_score_matrix(distance, naive, monkeypatch):
    tokens, keys = random_tokens(torch.float32, tokens=160), H * 160
    with LargestTensor() as mode:
        naive(*tokens, heads=H)
    assert mode.elements == B * keys * 160
    with LargestTensor() as mode:
        distance(*tokens, heads=H, rows=40).backward()
    assert mode.elements == keys * 40
    # Rows left to the function follow from the problem's size.
    monkeypatch.setattr(relation, '_BLOCK_ELEMENTS', keys * 30 + 1)
    with LargestTensor() as mode:
        distance(*tokens, heads=H).backward()
    assert mode.elements == keys * 30


@pytest.mark.parametrize('images', [1, 2, 3, 5])
@pytest.mark.parametrize('distance, naive', [pair[:2] for pair in PAIRS])
def test_relation__whole_images_to_a_block(distance, naive, images, monkeypatch):
    tokens = [x.detach().repeat(3, 1, 1)[:5].contiguous() for x in random_tokens()]
    tokens = [x.add_(torch.linspace(-1, 1, 5, dtype=x.dtype).view(5, 1, 1)).requires_grad_(i < 2)
              for i, x in enumerate(tokens)]
    want = value_and_grads(naive, tokens, heads=H)
    monkeypatch.setattr(relation, '_BLOCK_ELEMENTS', images * H * N * N)
    scores = []
    block = relation._kl_block if distance is relation_kl else relation._smooth_l1_block

    def seen(student, teacher, parameter):
        scores.append(len(student))
        return block(student, teacher, parameter)
    monkeypatch.setattr(relation, block.__name__, seen)
    for got, expected in zip(value_and_grads(distance, tokens, heads=H), want):
        assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert scores == [images] * (5 // images) + [5 % images] * (5 % images > 0)


def test_split_heads__heads_are_slices_of_the_channels():
    x = torch.arange(2 * 3 * 6).view(2, 3, 6)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 3, 2)
    for h in range(3):
        assert torch.equal(heads[:, h], x[..., 2 * h:2 * h + 2])


@pytest.mark.parametrize('distance', [relation_kl, relation_smooth_l1])
def test_relation__heads_that_do_not_divide(distance):
    with pytest.raises(ValueError, match='5 relation heads do not divide the width 12'):
        distance(*random_tokens(), heads=5)
    # 4 divides the student's 12 channels, not the teacher's 18.
    with pytest.raises(ValueError, match='4 relation heads do not divide the width 18'):
        distance(*random_tokens(), heads=4)


@pytest.mark.parametrize('distance', [relation_kl, relation_smooth_l1])
def test_relation__token_counts_differ(distance):
    a, b, teacher_a, teacher_b = random_tokens()
    with pytest.raises(ValueError, match=r'same tokens, got \(2, 7\) and \(2, 6\)'):
        distance(a, b, teacher_a[:, 1:], teacher_b[:, 1:], heads=H)
    with pytest.raises(ValueError, match=r'same tokens, got \(2, 7\) and \(1, 7\)'):
        distance(a, b, teacher_a[:1], teacher_b[:1], heads=H)


def test_relation_smooth_l1__negative_beta():
    with pytest.raises(ValueError, match='0 or more, got -0.5'):
        relation_smooth_l1(*random_tokens(), heads=H, beta=-0.5)


def test_relation_kl__without_gradients_asks_for_none():
    a, b = (torch.randn(1, 6, 8, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        without = relation_kl(a, b, a, b.flip(1), heads=2)
    assert not without.requires_grad
    torch.testing.assert_close(without, relation_kl(a, b, a, b.flip(1), heads=2).detach())
