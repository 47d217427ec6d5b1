import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmhdistill.functional import attention_distance, attention_from_qk, attention_nmi, attention_statistics


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('extra', [0, 1, 3])
def test_attention_from_qk__rows_sum_to_one(extra):
    attention = attention_from_qk(random(2, extra + 6, 8, seed=1), random(2, extra + 6, 8, seed=2), 4, extra)
    assert attention.shape == (2, 4, 6, 6)
    assert_close(attention.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64), rtol=0.0, atol=1e-14)
    assert attention.min() > 0


def test_attention_from_qk__extra_tokens_are_dropped_and_rows_renormalised():
    extra, heads, q, k = 2, 2, random(2, 7, 8, seed=1).double(), random(2, 7, 8, seed=2).double()
    got = attention_from_qk(q.float(), k.float(), heads, extra)
    for image in range(2):
        for head in range(heads):
            channels = slice(head * 4, head * 4 + 4)
            weights = np.exp(q[image, :, channels].numpy() @ k[image, :, channels].numpy().T / math.sqrt(4))
            patches = weights[extra:, extra:]
            want = torch.from_numpy(patches / patches.sum(axis=1, keepdims=True))
            assert_close(got[image, head], want, rtol=1e-12, atol=0.0)


def test_attention_nmi__identity_is_one():
    assert attention_nmi(torch.eye(16).expand(2, 1, 16, 16)).item() == pytest.approx(1.0, abs=1e-3)


def test_attention_nmi__query_independent_attention_is_zero():
    row = random(2, 3, 1, 16).softmax(-1)
    assert attention_nmi(row.expand(-1, -1, 16, -1)).abs().max() < 1e-6


def test_attention_nmi__one_key_sink_is_zero():
    # The entropy of its keys is so small that float32 rounding alone shows as 4e-6.
    scores = torch.zeros(1, 1, 196, 196)
    scores[..., 0] = 20.0
    assert attention_nmi(scores.softmax(-1)).abs().item() < 1e-10


def test_attention_nmi__per_head():
    heads = torch.stack([torch.eye(8), torch.full((8, 8), 1 / 8), torch.eye(8).roll(3, dims=0)]).unsqueeze(0)
    assert_close(attention_nmi(heads), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), rtol=0.0, atol=1e-5)


def test_attention_nmi__equals_joint_distribution():
    attention = (2 * random(3, 2, 10, 10)).double().softmax(-1)
    want = np.zeros(2)
    for head in range(2):
        for image in range(3):
            a = attention[image, head].numpy() + 1e-8
            joint = a / a.sum(axis=1, keepdims=True) / 10
            p_query, p_key = joint.sum(axis=1), joint.sum(axis=0)
            information = (joint * np.log(joint / np.outer(p_query, p_key))).sum()
            entropies = [-(p * np.log(p)).sum() for p in (p_query, p_key)]
            want[head] += information / np.sqrt(entropies[0] * entropies[1]) / 3
    assert attention_nmi(attention).tolist() == pytest.approx(want.tolist(), rel=1e-10)
    assert want.min() > 0.05 and want.max() < 0.95


def test_attention_distance__identity_is_zero():
    assert attention_distance(torch.eye(12).expand(2, 3, 12, 12), (3, 4), 16).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize('rows, columns', [(1, 2), (1, 7), (5, 1)])
def test_attention_distance__uniform_on_a_line_is_the_closed_form(rows, columns):
    # Mean of |i - j| over all pairs of n places: (n^2 - 1) / 3n.
    n = rows * columns
    uniform = torch.full((1, 1, n, n), 1 / n, dtype=torch.float64)
    assert attention_distance(uniform, (rows, columns), 8).item() == pytest.approx(8 * (n * n - 1) / (3 * n), rel=1e-12)


def test_attention_distance__uniform_on_a_grid_is_the_mean_of_all_distances():
    grid, patch = (3, 5), 4
    places = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    want = patch * sum(math.hypot(a - c, b - d) for a, b in places for c, d in places) / 15**2
    assert attention_distance(torch.full((2, 1, 15, 15), 1 / 15), grid, patch).item() == pytest.approx(want, rel=1e-6)


def test_attention_distance__one_step_to_the_right_is_one_patch():
    # The last column looks back to the first: 2 patches.
    step = torch.eye(6)[torch.tensor([1, 2, 0, 4, 5, 3])]
    down = torch.eye(6).roll(3, dims=1)
    distance = attention_distance(torch.stack([step, down]).unsqueeze(0), (2, 3), 16)
    assert distance.tolist() == pytest.approx([16 * 4 / 3, 16.0])


@pytest.mark.parametrize('extra', [0, 1, 3])
@pytest.mark.parametrize('rows', [None, 1, 5, 12, 100])
def test_attention_statistics__equal_those_of_the_whole_map(extra, rows):
    q, k = random(3, extra + 12, 8, seed=1) * 2, random(3, extra + 12, 8, seed=2) * 2
    attention = attention_from_qk(q, k, 2, extra)
    got = attention_statistics(q, k, 2, (3, 4), 16, extra, rows)
    assert_close(got['nmi'], attention_nmi(attention), rtol=1e-10, atol=0.0)
    assert_close(got['distance'], attention_distance(attention, (3, 4), 16), rtol=1e-10, atol=0.0)


def test_attention_statistics__known_answers():
    # Scores of +-200: every query attends to itself alone.
    sharp = torch.eye(16).mul(40).unsqueeze(0)
    got = attention_statistics(sharp, sharp, 1, (4, 4), 8)
    assert got['nmi'].item() == pytest.approx(1.0, abs=1e-3) and got['distance'].item() < 1e-6
    # Equal queries: every one attends alike, here to one key.
    alike = random(1, 1, 32).expand(2, 196, 32) * 5
    got = attention_statistics(alike, random(2, 196, 32, seed=3), 2, (14, 14), 16)
    assert got['nmi'].abs().max() < 1e-10


@pytest.mark.parametrize('sharpness', [1, 1000])
def test_attention__sink_of_the_class_token_swallows_nothing(sharpness):
    # Every query's score with the class token is far above the others: the patches' share of it underflows.
    q, k = random(2, 13, 8, seed=1), random(2, 13, 8, seed=2)
    q[..., 0], k[:, 0, 0] = 30.0, 30.0 * sharpness
    patches = attention_from_qk(q[:, 1:], k[:, 1:], 1)
    attention = attention_from_qk(q, k, 1, 1)
    assert_close(attention, patches, rtol=0.0, atol=0.0)
    if sharpness == 1:
        whole = attention_from_qk(q, k, 1)[..., 1:, 1:]
        assert_close(attention, whole / whole.sum(dim=-1, keepdim=True), rtol=1e-9, atol=0.0)
    got = attention_statistics(q, k, 1, (3, 4), 16, 1)
    assert_close(got['nmi'], attention_nmi(patches), rtol=1e-10, atol=0.0)


def test_attention__grids_and_numbers_of_patches_that_are_refused():
    q = random(1, 12, 8)
    for grid in ((1, 1), (12, ), (3, 5)):
        with pytest.raises(ValueError, match='does not have the 12 patches'):
            attention_statistics(q, q, 1, grid, 16)
        with pytest.raises(ValueError, match='does not have the 12 patches'):
            attention_distance(attention_from_qk(q, q, 1), grid, 16)
    with pytest.raises(ValueError, match='at least 2 patches, got 1'):
        attention_nmi(torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match='at least 2 patches, got 1'):
        attention_statistics(q[:, :2], q[:, :2], 1, (1, 1), 16, 1)
