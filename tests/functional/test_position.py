import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmhdistill.functional import POSITION_RULES, resample_positions
from mmhdistill.functional.position import sincos_positions

GRIDS = [((14, 14), (16, 16)), ((14, 14), (7, 7)), ((16, 16), (14, 14)), ((37, 37), (16, 16)), ((6, 6), (4, 9))]


def random_positions(grid, channels=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, grid[0] * grid[1], channels, generator=generator).to(dtype)


def as_image(positions, grid):
    """(h, w, C), float64."""
    return positions.double().reshape(*grid, -1).numpy()


def cubic_matrix(source, target, step):
    """Keys's cubic convolution with a = -0.75 at centres ``step`` apart, borders repeated."""
    matrix = np.zeros((target, source))
    for row in range(target):
        x = (row + 0.5) * step - 0.5
        for tap in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - tap)
            weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(tap, 0), source - 1)] += weight
    return matrix


def moco_positions(side, channels):
    """MoCo v3's build_2d_sincos_position_embedding, line by line."""
    steps = torch.arange(side, dtype=torch.float32)
    grid_w, grid_h = torch.meshgrid(steps, steps, indexing='ij')
    pos_dim = channels // 4
    omega = torch.arange(pos_dim, dtype=torch.float32) / pos_dim
    omega = 1. / (10000.**omega)
    out_w = torch.einsum('m,d->md', [grid_w.flatten(), omega])
    out_h = torch.einsum('m,d->md', [grid_h.flatten(), omega])
    return torch.cat([torch.sin(out_w), torch.cos(out_w), torch.sin(out_h), torch.cos(out_h)], dim=1)[None, :, :]


@pytest.mark.parametrize('source, target', GRIDS)
@pytest.mark.parametrize('rule, offset', [('bicubic', 0.0), ('bicubic-offset', 0.1)])
def test_resample_positions__bicubic_is_cubic_convolution(rule, offset, source, target):
    positions = random_positions(source)
    rows, columns = (cubic_matrix(s, t, s / (t + offset)) for s, t in zip(source, target))
    expected = np.einsum('yh,xw,hwc->yxc', rows, columns, as_image(positions, source))
    found = resample_positions(positions, source, target, rule)
    assert_close(as_image(found, target), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('target', [(16, 16), (12, 12), (10, 20)])
def test_resample_positions__bicubic_offset_is_the_code_of_dino(target):
    patch_pos_embed = random_positions((14, 14))
    dim, N = 8, 14 * 14
    w0, h0 = target[0] + 0.1, target[1] + 0.1
    expected = F.interpolate(
        patch_pos_embed.reshape(1, int(math.sqrt(N)), int(math.sqrt(N)), dim).permute(0, 3, 1, 2),
        scale_factor=(w0 / math.sqrt(N), h0 / math.sqrt(N)),
        mode='bicubic',
    )
    assert (int(w0), int(h0)) == tuple(expected.shape[-2:])
    expected = expected.permute(0, 2, 3, 1).view(1, -1, dim)
    assert_close(resample_positions(patch_pos_embed, (14, 14), target, 'bicubic-offset'), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('source, target', GRIDS)
def test_resample_positions__bicubic_antialias_is_the_code_of_timm(source, target):
    from timm.layers import resample_abs_pos_embed
    positions = random_positions(source)
    expected = resample_abs_pos_embed(positions, target, source, num_prefix_tokens=0)
    assert_close(resample_positions(positions, source, target, 'bicubic-antialias'), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('source, target', GRIDS)
def test_resample_positions__bilinear_corners_is_scipys_zoom(source, target):
    positions = random_positions(source)
    factors = [t / s for s, t in zip(source, target)]
    expected = scipy.ndimage.zoom(as_image(positions, source), [*factors, 1], order=1)
    found = as_image(resample_positions(positions, source, target, 'bilinear-corners'), target)
    assert_close(found, expected, rtol=0, atol=1e-5)
    corners = np.ix_([0, -1], [0, -1])
    assert_close(found[corners], as_image(positions, source)[corners], rtol=0, atol=1e-6)


@pytest.mark.parametrize('rule', ['bicubic', 'bicubic-antialias', 'bicubic-offset', 'bilinear-corners'])
def test_resample_positions__an_image_that_grows_to_the_right_goes_on_doing_so(rule):
    # Rows must not be taken for columns: no rule moves anything from one axis to the other.
    ramp = torch.arange(9.0).expand(6, 9).reshape(1, -1, 1)
    found = resample_positions(ramp, (6, 9), (4, 13), rule).reshape(4, 13)
    assert_close(found, found[:1].expand(4, -1), rtol=0, atol=1e-5)
    assert (found.diff(dim=1) > 0.1).all()


@pytest.mark.parametrize('row, column, channel, expected', [
    (3, 5, 0, math.sin(3)),
    (3, 5, 1, math.sin(3 * 10000**-0.25)),
    (3, 5, 4, math.cos(3)),
    (3, 5, 7, math.cos(3 * 10000**-0.75)),
    (3, 5, 8, math.sin(5)),
    (3, 5, 10, math.sin(5 * 10000**-0.5)),
    (3, 5, 13, math.cos(5 * 10000**-0.25)),
    (0, 0, 6, 1.0),
    (0, 0, 9, 0.0),
])
def test_sincos_positions__closed_form(row, column, channel, expected):
    found = sincos_positions((4, 7), 16)
    assert found.shape == (1, 28, 16)
    assert found[0, row * 7 + column, channel].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('side, channels', [(14, 384), (16, 768)])
def test_sincos_positions__native_grid_is_mocos_own(side, channels):
    assert_close(sincos_positions((side, side), channels), moco_positions(side, channels), rtol=0, atol=2e-6)


def test_resample_positions__sincos_is_mocos_for_the_new_grid_whatever_the_old_was():
    positions = random_positions((14, 14), channels=96)
    found = resample_positions(positions, (14, 14), (16, 16), 'sincos')
    assert_close(found, moco_positions(16, 96), rtol=0, atol=2e-6)


def test_sincos_positions__channels_that_cannot_be_split():
    with pytest.raises(ValueError, match='sin-cos positions need a multiple of 4 channels, got 18'):
        sincos_positions((2, 2), 18)


@pytest.mark.parametrize('rule', POSITION_RULES)
def test_resample_positions__same_grid_is_untouched(rule):
    positions = random_positions((3, 5))
    assert resample_positions(positions, (3, 5), (3, 5), rule) is positions


@pytest.mark.parametrize('rule', POSITION_RULES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_resample_positions__keeps_the_dtype_and_computes_in_single_precision(rule, dtype):
    positions = random_positions((6, 6), dtype=dtype)
    found = resample_positions(positions, (6, 6), (4, 9), rule)
    assert found.dtype == dtype
    assert torch.equal(found, resample_positions(positions.float(), (6, 6), (4, 9), rule).to(dtype))


@pytest.mark.parametrize('source, target', GRIDS)
def test_resample_positions__rules_differ(source, target):
    positions = random_positions(source)
    found = [resample_positions(positions, source, target, rule) for rule in POSITION_RULES]
    alike = [(POSITION_RULES[a], POSITION_RULES[b]) for a in range(len(found)) for b in range(a)
             if (found[a] - found[b]).abs().max() < 0.01]
    # Growing needs no low-pass filter: it has the plain rule's samples, but with another cubic kernel.
    assert alike == []
