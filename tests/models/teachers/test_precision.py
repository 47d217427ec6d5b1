"""A teacher's own precision, and its blocks compiled."""
from functools import partial

import pytest
import torch

from mmhdistill.models.teachers import ViTTeacher
from tests.helpers import build_distiller, random_images, randomise, tiny_card, tiny_teacher

GRID = (4, 4)
TAPS = {0: frozenset('qk'), 1: frozenset({'hidden'}), 2: frozenset({'features'})}


def teacher(**kwargs):
    torch.manual_seed(0)
    return randomise(ViTTeacher(tiny_card(), checkpoint=None, **kwargs))


def taps(model, images=None):
    return model(random_images() if images is None else images, GRID, TAPS).taps


def largest_error(found, expected):
    return max(((found[key].float() - value).abs().max() / value.abs().max()).item()
               for key, value in expected.items())


def test_dtype__is_that_of_the_products_under_any_autocast():
    exact = taps(teacher())
    assert {x.dtype for x in exact.values()} == {torch.float32}
    for dtype, error in (('bfloat16', 0.05), ('float16', 0.01)):
        found = taps(teacher(dtype=dtype))
        assert found[0, 'q'].dtype == getattr(torch, dtype)
        assert 1e-4 < largest_error(found, exact) < error
    with torch.autocast('cpu', torch.bfloat16):
        follows, holds = taps(teacher()), taps(teacher(dtype='float32'))
    assert follows[0, 'q'].dtype == torch.bfloat16
    assert all(torch.equal(holds[key], value) for key, value in exact.items())


def test_dtype__weights_and_losses_stay_in_float32():
    exact = build_distiller()
    half = build_distiller(teachers=dict(
        clip=dict(tiny_teacher(name='clip-like', embed_dims=48, pre_norm=True), dtype='bfloat16'),
        mae=dict(tiny_teacher(name='mae-like'), dtype='bfloat16')))
    assert {p.dtype for model in half.teachers.values() for p in model.parameters()} == {torch.float32}
    images = random_images(4)
    losses, found = exact.loss(images), half.loss(images)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert loss.item() != losses[name].item()
        assert loss.item() == pytest.approx(losses[name].item(), rel=0.1)


def test_dtype__unknown_one():
    with pytest.raises(ValueError, match="'bf16': choose float32, bfloat16 or float16"):
        teacher(dtype='bf16')


@pytest.fixture
def compiled_blocks(monkeypatch):
    """Graphs that torch.compile made, by a backend that runs them as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    return graphs


def test_compile__one_graph_for_all_blocks_and_the_same_taps(compiled_blocks):
    exact, found = taps(teacher()), taps(teacher(compile=True))
    assert len(compiled_blocks) == 1
    assert largest_error(found, exact) < 1e-6


def test_compile__few_graphs_for_token_counts_that_ramp(compiled_blocks):
    model, plain = teacher(compile=True, masked=True), teacher(masked=True)
    for kept in (16, 14, 12, 10, 8, 6):
        keep_ids = torch.arange(kept).expand(2, -1)
        found, exact = (each(random_images(), GRID, TAPS, keep_ids).taps for each in (model, plain))
        assert largest_error(found, exact) < 1e-6
    assert len(compiled_blocks) <= 2


@pytest.mark.slow
def test_compile__by_inductor():
    torch._dynamo.reset()
    assert largest_error(taps(teacher(compile=True)), taps(teacher())) < 1e-5
