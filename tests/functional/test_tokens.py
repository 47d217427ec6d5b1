import pytest
import torch

from mmhdistill.functional import (
    check_keep_rate,
    dropped_ids,
    gather_patches,
    gather_tokens,
    kept_counts,
    least_redundant,
    scatter_tokens,
)

INPUT, ENCODER = [1, 2, 3], [0, 1, 2]


@pytest.mark.parametrize('keep_rate, stages, counts', [
    (0.7, INPUT, [137, 96, 67]),
    (0.7, ENCODER, [196, 137, 96]),
    (0.8, INPUT, [157, 125, 100]),
    (0.8, ENCODER, [196, 157, 125]),
    (0.9, INPUT, [176, 159, 143]),
    (0.9, ENCODER, [196, 176, 159]),
    (1.0, INPUT, [196, 196, 196]),
])
def test_kept_counts__of_196_patches(keep_rate, stages, counts):
    assert kept_counts(196, keep_rate, stages) == counts


def test_kept_counts__halves_round_up():
    # 2.5 and 1.25; banker's rounding would give 2 and 1.
    assert kept_counts(5, 0.5, [1, 2]) == [3, 1]


def test_kept_counts__never_empty():
    assert kept_counts(4, 0.1, INPUT) == [1, 1, 1]
    assert kept_counts(1, 0.3, ENCODER) == [1, 1, 1]


def test_kept_counts__round_to():
    assert kept_counts(196, 0.7, INPUT, round_to=8) == [144, 96, 72]
    # A multiple above N would ask for more patches than there are.
    assert kept_counts(196, 0.7, ENCODER, round_to=128) == [196, 196, 128]


@pytest.mark.parametrize('keep_rate', [0, -1, 1.1, float('nan')])
def test_check_keep_rate__out_of_range(keep_rate):
    with pytest.raises(ValueError, match=rf'must lie in \(0, 1\], got {keep_rate}'):
        check_keep_rate(keep_rate)
    with pytest.raises(ValueError, match=rf'must lie in \(0, 1\], got {keep_rate}'):
        kept_counts(196, keep_rate, INPUT)


def test_least_redundant__lowest_scores_in_ascending_order_of_index():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.8], [-3.0, 4.0, -5.0, 0.0, -4.0]])
    assert least_redundant(scores, 3).tolist() == [[1, 2, 3], [0, 2, 4]]
    assert least_redundant(scores, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_least_redundant__ties_go_by_position():
    # Many equal scores: an unstable selection shows only in rows of some length.
    scores = torch.zeros(2, 4096)
    scores[1, :100] = 1.0
    kept = least_redundant(scores, 50)
    assert kept[0].tolist() == list(range(50))
    assert kept[1].tolist() == list(range(100, 150))


def test_gather_tokens__rows_per_image():
    x = torch.arange(2 * 4 * 3).view(2, 4, 3)
    ids = torch.tensor([[0, 3], [2, 1]])
    assert torch.equal(gather_tokens(x, ids), torch.stack([x[0, [0, 3]], x[1, [2, 1]]]))


def test_scatter_tokens__round_trip():
    x = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:4] for i in range(3)])
    kept = gather_tokens(x, ids)
    full = scatter_tokens(kept, ids, 9, fill=-7.0)
    assert torch.equal(gather_tokens(full, ids), kept)
    dropped = torch.ones(3, 9, dtype=torch.bool).scatter(1, ids, False)
    assert torch.equal(full[dropped], torch.full((3 * 5, 5), -7.0))
    assert torch.equal(full[~dropped], x[~dropped])


@pytest.mark.parametrize('num_tokens, count', [(1, 1), (9, 1), (9, 4), (9, 8), (9, 9), (300, 75), (5000, 100)])
def test_dropped_ids__the_rest_in_ascending_order(num_tokens, count):
    # In any order, and long enough for an unstable sort to show.
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(num_tokens, generator=generator)[:count] for _ in range(3)])
    expected = [sorted(set(range(num_tokens)) - set(row)) for row in ids.tolist()]
    dropped = dropped_ids(ids, num_tokens)
    assert dropped.shape == (3, num_tokens - count)
    assert dropped.tolist() == expected


@pytest.mark.parametrize('extra', [0, 1, 5])
def test_gather_patches__extra_tokens_stay_bit_for_bit(extra):
    x = torch.randn(2, extra + 6, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 0], [1, 4]])
    out = gather_patches(x, ids, extra)
    assert out.shape == (2, extra + 2, 4)
    assert torch.equal(out[:, :extra], x[:, :extra])
    for image in (0, 1):
        assert torch.equal(out[image, extra:], x[image, extra + ids[image]])
