"""What holds of the relation distances for any images, tokens, heads, widths and precisions."""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmhdistill.functional import relation_kl, relation_smooth_l1
from tests.functional.test_relation import naive_kl, naive_smooth_l1, value_and_grads

few = settings(max_examples=40, derandomize=True, deadline=None, database=None)
HALF = [torch.float16, torch.bfloat16]


@st.composite
def problems(draw, dtypes=(torch.float64, ), scales=(0.0, 0.1, 1.0, 5.0)):
    """Tokens (a, b, teacher_a, teacher_b) and the number of heads."""
    heads = draw(st.integers(1, 4))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    width, teacher_width = heads * draw(st.integers(1, 5)), heads * draw(st.integers(1, 5))
    dtype, scale = draw(st.sampled_from(dtypes)), draw(st.sampled_from(scales))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drawn = [scale * torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
             for channels in (width, width, teacher_width, teacher_width)]
    a, b, teacher_a, teacher_b = (x.to(dtype) for x in drawn)
    return (a.requires_grad_(), b.requires_grad_(), teacher_a, teacher_b), heads


distances = st.one_of(
    st.tuples(st.just(relation_kl), st.just(naive_kl), st.builds(dict, temperature=st.floats(0.2, 5))),
    st.tuples(st.just(relation_smooth_l1), st.just(naive_smooth_l1),
              st.builds(dict, beta=st.one_of(st.just(0.0), st.floats(0.1, 5)))))
rows = st.one_of(st.none(), st.integers(1, 12))


@few
@given(problems(), distances, rows)
def test_relation__value_and_gradient_are_those_of_the_naive_formula(problem, distance, rows):
    (tokens, heads), (ours, naive, kwargs) = problem, distance
    got = value_and_grads(ours, tokens, heads=heads, rows=rows, **kwargs)
    want = value_and_grads(naive, tokens, heads=heads, **kwargs)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, rtol=1e-9, atol=1e-12)


@few
@given(problems(), distances, rows, st.randoms(use_true_random=False))
def test_relation__order_of_tokens_and_images_does_not_matter(problem, distance, rows, random):
    (tokens, heads), (ours, _, kwargs) = problem, distance
    order, images = (torch.tensor(random.sample(range(number), number)) for number in tokens[0].shape[1::-1])
    value, *grads = value_and_grads(ours, tokens, heads=heads, rows=rows, **kwargs)
    moved = [x.detach()[images][:, order].requires_grad_(x.requires_grad) for x in tokens]
    other, *others = value_and_grads(ours, moved, heads=heads, rows=rows, **kwargs)
    assert_close(other, value, rtol=1e-9, atol=1e-12)
    for moved_grad, grad in zip(others, grads, strict=True):
        assert_close(moved_grad, grad[images][:, order], rtol=1e-9, atol=1e-12)


@few
@given(problems(dtypes=[torch.float64, torch.float32]), st.floats(0.2, 5))
def test_relation_kl__is_no_less_than_zero(problem, temperature):
    tokens, heads = problem
    value = relation_kl(*tokens, heads=heads, temperature=temperature).item()
    assert value >= -4 * torch.finfo(tokens[0].dtype).eps
    if tokens[0].shape[1] == 1:  # a distribution over one key
        assert value == 0


@few
@given(problems(dtypes=[torch.float64, torch.float32, *HALF]), distances)
def test_relation__equal_tokens_are_at_distance_zero(problem, distance):
    ((a, b, _, _), heads), (ours, _, kwargs) = problem, distance
    value, *grads = value_and_grads(ours, (a, b, a.detach(), b.detach()), heads=heads, **kwargs)
    assert value.item() == 0
    assert all((grad == 0).all() for grad in grads)


@few
@given(problems(dtypes=HALF, scales=(50**0.5, )), distances, rows)
def test_relation__half_precision_of_scores_times_50_is_finite_and_exact(problem, distance, rows):
    (tokens, heads), (ours, naive, kwargs) = problem, distance
    dtype = tokens[0].dtype
    value, *grads = value_and_grads(ours, tokens, heads=heads, rows=rows, **kwargs)
    assert value.dtype == torch.float32 and torch.isfinite(value)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tokens]
    want, *want_grads = value_and_grads(naive, exact, heads=heads, **kwargs)
    assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
    for grad, w in zip(grads, want_grads, strict=True):
        assert grad.dtype == dtype and torch.isfinite(grad).all()
        assert_close(grad.double(), w, rtol=torch.finfo(dtype).eps, atol=1e-4)


@few
@given(problems(dtypes=[torch.float64, torch.float32, *HALF]), distances)
def test_relation__of_one_image_is_its_share_of_the_batch(problem, distance):
    (tokens, heads), (ours, _, kwargs) = problem, distance
    together = ours(*tokens, heads=heads, **kwargs)
    alone = [ours(*(x[image:image + 1] for x in tokens), heads=heads, **kwargs) for image in range(len(tokens[0]))]
    assert together.dtype == torch.promote_types(tokens[0].dtype, torch.float32)
    assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)
