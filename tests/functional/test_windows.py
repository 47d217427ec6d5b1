import pytest
import torch
import torch.nn.functional as F

from mmhdistill.functional import from_windows, relative_attention, relative_embeddings, resample_table, to_windows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def textbook_attention(q, k, v, grid, tables=None, inside=None):
    """Bias and mask as N x N tensors, one entry at a time."""
    rows, columns = grid
    scores = q @ k.transpose(-1, -2) / q.shape[-1]**0.5
    for i in range(rows * columns if tables else 0):
        for j in range(rows * columns):
            for table, a, b, side in ((tables[0], i // columns, j // columns, rows),
                                      (tables[1], i % columns, j % columns, columns)):
                scores[..., i, j] += q[..., i, :] @ table[a - b + side - 1]
    if inside is not None:
        scores = scores.masked_fill(~inside[:, None, None], float('-inf'))
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize('with_tables', [False, True])
@pytest.mark.parametrize('with_mask', [False, True])
def test_relative_attention__equals_the_textbook_form_and_its_gradients(with_tables, with_mask):
    grid = (3, 4)
    q, k, v = (random(2, 2, 12, 5, seed=seed).requires_grad_() for seed in range(3))
    tables = tuple(random(2 * side - 1, 5, seed=side).requires_grad_() for side in grid) if with_tables else None
    inside = torch.ones(2, 12, dtype=torch.bool)
    inside[0, [3, 7]] = False
    inside = inside if with_mask else None
    leaves = [q, k, v, *(tables or ())]
    ours, reference = (f(q, k, v, grid, tables, inside) for f in (relative_attention, textbook_attention))
    assert (ours - reference).abs().max() < 1e-12
    weight = random(*ours.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), leaves) for out in (ours, reference))):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_relative_attention__keys_outside_get_no_weight_in_half_precision(dtype):
    q, k, v = (random(1, 1, 4, 8, seed=seed).to(dtype) for seed in range(3))
    inside = torch.tensor([[True, True, True, False]])
    out = relative_attention(q, k, v, (2, 2), None, inside)
    v[:, :, 3] = 1000.0
    assert torch.equal(relative_attention(q, k, v, (2, 2), None, inside), out)


@pytest.mark.parametrize('with_tables', [False, True])
@pytest.mark.parametrize('with_mask', [False, True])
def test_relative_attention__dropout_is_of_weights_after_the_softmax(with_tables, with_mask):
    # Of equal weights 1/4, those left are 1/3: the result counts them.
    k, v = random(500, 2, 4, 8), torch.ones(500, 2, 4, 8, dtype=torch.float64)
    tables = (random(3, 8), random(3, 8)) if with_tables else None
    inside = torch.ones(500, 4, dtype=torch.bool) if with_mask else None
    torch.manual_seed(0)
    kept = relative_attention(k * 0, k, v, (2, 2), tables, inside, dropout=0.25)[..., 0] * 3
    assert (kept - kept.round()).abs().max() < 1e-12
    # Of 4 keys each is kept with probability 3/4: a mean of 3, whose error is 0.014 in 4000 rows.
    assert abs(kept.mean() - 3) < 0.06 and set(kept.round().unique().tolist()) == {0, 1, 2, 3, 4}


def test_resample_table__is_linear_and_keeps_what_fits():
    table = torch.arange(5.0)[:, None] * torch.tensor([1.0, -2.0])
    assert resample_table(table, 3) is table
    # Centres of nine pixels in five: steps of 5/9.
    steps = ((torch.arange(9.0) + 0.5) * 5 / 9 - 0.5).clamp(0, 4)[:, None]
    assert torch.allclose(resample_table(table, 5), steps * torch.tensor([1.0, -2.0]), atol=1e-6)
    assert torch.equal(relative_embeddings(table, 5)[0].flip(0), resample_table(table, 5)[:5])


def test_relative_embeddings__index_by_the_difference():
    table = torch.arange(5.0)[:, None]
    assert relative_embeddings(table, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_relative_embeddings__of_another_side_are_interpolated():
    table = random(5, 4).float()
    expected = F.interpolate(table.T[None], 7, mode='linear')[0].T
    assert torch.allclose(relative_embeddings(table, 4)[3], expected.flip(0)[:4])


@pytest.mark.parametrize('grid, window', [((4, 6), 2), ((5, 7), 3), ((3, 3), 5), ((1, 4), 4)])
def test_windows__there_and_back(grid, window):
    x = random(2, 3, grid[0] * grid[1], 4)
    windows, inside = to_windows(x, grid, window)
    count = -(-grid[0] // window) * -(-grid[1] // window)
    assert windows.shape == (2 * count, 3, window**2, 4)
    assert torch.equal(from_windows(windows, grid, window), x)
    # What was padded is zero, and is all that is not inside.
    assert (inside is None) == (grid[0] % window == grid[1] % window == 0)
    if inside is not None:
        assert inside.sum() == 2 * grid[0] * grid[1]
        assert windows.transpose(1, 2)[~inside].abs().sum() == 0


def test_windows__hold_neighbours():
    x = torch.arange(16.0).reshape(1, 1, 16, 1)
    assert to_windows(x, (4, 4), 2)[0][:, 0, :, 0].tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
