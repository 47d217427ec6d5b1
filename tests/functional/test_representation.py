import math

import numpy as np
import pytest
import torch

from mmhdistill.functional import effective_rank, fourier_log_amplitude, linear_cka, linear_cka_matrix


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('n', [100, 8])
def test_linear_cka__of_a_rotation_shift_and_scaling_is_one(n):
    x = random(n, 12)
    rotation = torch.linalg.qr(random(12, 12, seed=1))[0]
    assert linear_cka(x, 3 * x @ rotation + 5).item() == pytest.approx(1.0, rel=1e-12)
    assert linear_cka(x, x @ random(12, 12, seed=2)).item() < 0.9


def test_linear_cka__is_the_correlation_squared_of_one_channel():
    x, y = random(50, 1), random(50, 1, seed=1)
    want = np.corrcoef(x[:, 0], y[:, 0])[0, 1]**2
    assert linear_cka(x, y).item() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize('n', [40, 10])
def test_linear_cka__both_forms_are_that_of_the_kernels(n):
    """HSIC with linear kernels; ten things in 20 channels are compared as kernels, 40 are not."""
    x, y = random(n, 20), random(n, 7, seed=1)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    want = torch.trace(k @ m) / (torch.trace(k @ k) * torch.trace(m @ m)).sqrt()
    assert linear_cka(x, y).item() == pytest.approx(want.item(), rel=1e-10)
    assert linear_cka(y, x).item() == pytest.approx(want.item(), rel=1e-10)


@pytest.mark.parametrize('n', [40, 10])
def test_linear_cka_matrix__is_that_of_each_pair(n):
    xs, ys = [random(n, 20, seed=seed) for seed in range(2)], [random(n, 7, seed=seed) for seed in range(2, 5)]
    found = linear_cka_matrix(xs, ys)
    assert found.shape == (2, 3)
    for row, x in zip(found, xs):
        assert row.tolist() == pytest.approx([linear_cka(x, y).item() for y in ys], rel=1e-10)


def test_linear_cka__of_other_numbers_of_things_is_refused():
    with pytest.raises(ValueError, match='same things, got 5 and 6'):
        linear_cka(random(5, 2), random(6, 2))


@pytest.mark.parametrize('dims', [1, 3, 8])
def test_effective_rank__of_a_gaussian_is_its_dimension(dims):
    x = random(100_000, dims) @ torch.linalg.qr(random(8, 8, seed=1))[0][:dims]
    assert effective_rank(x + 7).item() == pytest.approx(dims, rel=1e-3)


def test_effective_rank__of_two_known_singular_values():
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    p = 3 / 4, 1 / 4
    assert effective_rank(x).item() == pytest.approx(math.exp(-sum(part * math.log(part) for part in p)), rel=1e-12)


@pytest.mark.parametrize('side', [8, 7])
def test_fourier_log_amplitude__of_a_wave_stands_out_at_its_frequency(side):
    place = torch.arange(side, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * 2 / side * (place[:, None] + place))
    curve = fourier_log_amplitude((1 + wave).expand(2, 3, -1, -1))
    assert curve.shape == (side // 2 + 1, ) and curve[0] == 0
    # Amplitude s^2 / 2 at the wave's frequency and s^2 at 0.
    assert curve[2].item() == pytest.approx(math.log(0.5), abs=1e-6)
    assert curve[1] < -10 and curve[3] < -10


def test_fourier_log_amplitude__of_white_noise_is_the_closed_form():
    # Of a complex Gaussian E log|z| is log(2) / 2 above that of a real one, which it is at frequencies 0 and pi.
    noise = random(256, 64, 16, 16)
    want = [0.0] + [math.log(2) / 2] * 7 + [0.0]
    assert fourier_log_amplitude(noise).tolist() == pytest.approx(want, abs=0.04)
    # The response of a mean of 3 neighbours is (1 + 2 cos w) / 3; w = pi / 2 at the fourth.
    assert fourier_log_amplitude((noise + noise.roll(1, -1) + noise.roll(-1, -1)) / 3)[4].item() == pytest.approx(
        want[4] + math.log(1 / 3), abs=0.04)


def test_fourier_log_amplitude__needs_square_maps():
    with pytest.raises(ValueError, match=r'square maps, got \(4, 6\)'):
        fourier_log_amplitude(random(1, 1, 4, 6))


@pytest.mark.parametrize('shape', [(60, 8), (8, 60)])
def test_effective_rank__is_that_of_the_singular_values(shape):
    x = random(*shape) * torch.logspace(0, -3, shape[1])
    values = torch.linalg.svdvals(x.double() - x.double().mean(dim=0))
    share = values[values > 1e-10] / values.sum()
    assert effective_rank(x).item() == pytest.approx((-share * share.log()).sum().exp().item(), rel=1e-6)


def test_representation__of_what_does_not_vary_or_is_not_finite_is_nan():
    x = random(20, 4)
    for bad in (torch.ones(20, 4), torch.full((20, 4), float('nan')), x.index_fill(0, torch.tensor([3]), float('inf'))):
        assert effective_rank(bad).isnan()
        assert linear_cka(x, bad).isnan()
