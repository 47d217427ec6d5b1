"""What holds of the token masker for any model, images, stages, keep rates and precisions."""
import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmhdistill.models import ProgressiveTokenMasker
from mmhdistill.models.taps import ViTOutput, ViTSpec

few = settings(max_examples=40, derandomize=True, deadline=None, database=None)
NAMES = ('Similarity', 'CLSAttention', 'Random')
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device('cpu')


class Watched:
    """A scorer that keeps its scores."""

    def __init__(self, scorer):
        self.scorer, self.kinds, self.scores = scorer, scorer.kinds, []

    def __call__(self, *args):
        self.scores.append(self.scorer(*args))
        return self.scores[-1]


@st.composite
def specs(draw):
    heads = draw(st.integers(1, 4))
    return ViTSpec(embed_dims=heads * draw(st.integers(4, 8)), depth=draw(st.integers(1, 9)), num_heads=heads,
                   patch_size=8, num_extra_tokens=draw(st.integers(1, 5)))


@st.composite
def maskers(draw, place, names=NAMES):
    spec, name = draw(specs()), draw(st.sampled_from(names))
    masker = ProgressiveTokenMasker(
        place, keep_rate=draw(st.one_of(st.just(1.0), st.floats(0.05, 1.0))), scorer=dict(
            type=f'mmhdistill.{name}Scorer'), teacher='mim' if place == 'input' and name != 'Random' else None,
        num_stages=draw(st.integers(1, spec.depth)), round_to=draw(st.one_of(st.none(), st.integers(1, 9))))
    masker.bind(spec)
    masker.scorer = Watched(masker.scorer)
    return masker, spec


@st.composite
def images(draw):
    """Batch, patches, precision and a source of random tokens of a scale."""
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dtype, scale = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0.0, 1.0, 50.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tokens(number, width):
        return (scale * torch.randn(batch, number, width, generator=generator, dtype=torch.float64)).to(dtype)

    return batch, (rows, columns), tokens


def taps_of(masker, spec, grid, tokens):
    number = spec.num_extra_tokens + math.prod(grid)
    taps = {(layer, kind): tokens(number, spec.embed_dims) for layer, kinds in masker.taps.items()
            for kind in sorted(kinds)}
    return ViTOutput(taps, spec.num_extra_tokens, grid, {})


def assert_ascending_of(ids, number):
    assert ids.dtype == torch.int64 and (ids >= 0).all() and (ids < number).all()
    assert (ids.diff(dim=1) > 0).all()  # so each is another


@few
@given(maskers('input'), st.integers(1, 400))
def test_counts__follow_the_keep_rate(bound, number):
    masker, _ = bound
    counts = masker.counts(number)
    assert len(counts) == masker.num_stages
    assert number >= counts[0] and counts == sorted(counts, reverse=True) and counts[-1] >= 1
    for stage, count in enumerate(counts, 1):
        exact = number * masker.keep_rate**stage
        if masker.round_to is None:
            assert abs(count - exact) <= 0.5 + 1e-9 or (count == 1 and exact < 0.5)
        else:
            assert count == number or count % masker.round_to == 0
            assert exact - 0.5 - 1e-9 <= count < max(exact + 0.5, 1) + masker.round_to
    if masker.keep_rate == 1:
        assert counts == [number] * masker.num_stages


@few
@given(maskers('input'), images())
def test_input__keeps_as_many_distinct_patches_as_counted(bound, batch_of):
    (masker, spec), (batch, grid, tokens) = bound, batch_of
    number = math.prod(grid)
    reducer = masker.reducer(batch, number, CPU, taps_of(masker, spec, grid, tokens))
    counts = masker.counts(number)
    assert masker.last_counts == counts
    assert (reducer is None) == (counts[-1] == number)
    if reducer is None:
        return
    keep_ids = reducer(0, {})
    assert keep_ids.shape == (batch, counts[-1])
    assert_ascending_of(keep_ids, number)
    assert all(reducer(layer, {}) is None for layer in range(1, spec.depth))
    assert [tuple(scores.shape) for scores in masker.scorer.scores] == [(batch, k) for k in [number, *counts[:-1]]]
    assert all(torch.isfinite(scores).all() for scores in masker.scorer.scores)


@few
@given(maskers('encoder'), images())
def test_encoder__drops_to_what_was_counted_at_each_stage(bound, batch_of):
    (masker, spec), (batch, grid, tokens) = bound, batch_of
    number = math.prod(grid)
    reducer = masker.reducer(batch, number, CPU, None)
    counts, seen = masker.counts(number), []
    kept = torch.arange(number).expand(batch, -1)
    for layer in range(spec.depth):
        if reducer is not None:
            recorded = {(layer - 1, kind): tokens(spec.num_extra_tokens + kept.shape[1], spec.embed_dims)
                        for kind in masker.scorer.kinds}
            local = reducer(layer, recorded)
            if local is not None:
                assert_ascending_of(local, kept.shape[1])
                kept = kept.gather(1, local)
                assert_ascending_of(kept, number)
        seen.append(kept.shape[1])
    assert seen == masker.kept_by_layer(number, spec.depth)
    assert seen[0] == number and kept.shape == (batch, counts[-1])
    assert masker.last_counts == counts
    assert all(torch.isfinite(scores).all() for scores in masker.scorer.scores)


@few
@given(maskers('input', NAMES[:2]), images(), st.randoms(use_true_random=False))
def test_input__patches_in_another_order_are_kept_all_the_same(bound, batch_of, random):
    (masker, spec), (batch, grid, tokens) = bound, batch_of
    number, extra = math.prod(grid), spec.num_extra_tokens
    reference = taps_of(masker, spec, grid, tokens)
    everything, counts = torch.arange(number).expand(batch, -1), masker.counts(number)
    kept = masker.select(everything, counts, reference)
    # Equal scores, as of two patches that are compared with each other alone, are told apart by position.
    for scores, count in zip(masker.scorer.scores, counts, strict=True):
        if count < scores.shape[1]:
            ordered = scores.sort(dim=1).values
            assume((ordered[:, count] - ordered[:, count - 1] > 1e-6).all())
    order = torch.tensor(random.sample(range(number), number))
    for key, x in reference.taps.items():
        reference.taps[key] = torch.cat([x[:, :extra], x[:, extra:][:, order]], dim=1)
    moved = masker.select(everything, counts, reference)
    assert_ascending_of(moved, number)
    assert torch.equal(order[moved].sort(dim=1).values, kept)


@few
@given(maskers('input', NAMES[:2]), images())
def test_input__images_do_not_touch_each_other(bound, batch_of):
    (masker, spec), (batch, grid, tokens) = bound, batch_of
    everything, counts = torch.arange(math.prod(grid)).expand(batch, -1), masker.counts(math.prod(grid))
    reference = taps_of(masker, spec, grid, tokens)
    together = masker.select(everything, counts, reference)
    for scores, count in zip(masker.scorer.scores, counts, strict=True):
        if count < scores.shape[1]:
            ordered = scores.sort(dim=1).values
            gap = ordered[:, count] - ordered[:, count - 1]
            assume(((gap > 1e-6) | (gap == 0)).all())
    for image in range(batch):
        own = ViTOutput({key: x[image:image + 1] for key, x in reference.taps.items()}, spec.num_extra_tokens, grid, {})
        assert torch.equal(masker.select(everything[:1], counts, own), together[image:image + 1])
