import math

import pytest
import torch
from torch.testing import assert_close

from mmhdistill.functional import feature_distance, whiten


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_whiten__closed_form():
    # Mean 1, variance 4.
    x = torch.tensor([[[3.0, -1.0, 3.0, -1.0]]], dtype=torch.float64)
    want = torch.tensor([[[2.0, -2.0, 2.0, -2.0]]], dtype=torch.float64) / math.sqrt(4 + 1e-6)
    assert_close(whiten(x), want, rtol=1e-12, atol=0.0)
    assert_close(whiten(x, eps=5.0), want * math.sqrt(4 + 1e-6) / 3, rtol=1e-12, atol=0.0)


def test_whiten__each_token_by_itself():
    x = 3 * random(2, 5, 16).double() + 7
    want = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert_close(whiten(x), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_whiten__half_precision_is_promoted(dtype):
    x = (random(2, 3, 8) * 100).to(dtype)
    out = whiten(x)
    assert out.dtype == torch.float32
    assert_close(out, whiten(x.float()), rtol=0.0, atol=0.0)


def test_feature_distance__smooth_l1_closed_form():
    target = torch.zeros(1, 2, 2)
    prediction = torch.tensor([[[1.0, -1.0], [4.0, 0.0]]])
    # beta 2: d^2 / 4 below 2, d - 1 above.
    assert feature_distance(prediction, target, 'smooth_l1').item() == pytest.approx((0.25 + 0.25 + 3) / 4, rel=1e-6)
    assert feature_distance(prediction, target, 'smooth_l1', 1.0).item() == pytest.approx(4.5 / 4, rel=1e-6)


def test_feature_distance__mse_closed_form():
    prediction = torch.tensor([[[1.0, -1.0], [4.0, 0.0]]])
    assert feature_distance(prediction, torch.zeros(1, 2, 2), 'mse').item() == pytest.approx(18 / 4, rel=1e-6)


def test_feature_distance__cosine_closed_form():
    prediction = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]]])
    target = torch.tensor([[[5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    want = (0 + 1 + 2 + 1 - math.sqrt(0.5)) / 4
    assert feature_distance(prediction, target, 'cosine').item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('distance', ['smooth_l1', 'mse', 'cosine'])
def test_feature_distance__taken_in_the_precision_of_the_target(distance):
    prediction, target = random(2, 5, 8).bfloat16(), random(2, 5, 8, seed=1)
    want = feature_distance(prediction.double(), target.double(), distance)
    assert feature_distance(prediction, target, distance).item() == pytest.approx(want.item(), rel=1e-6)


def test_feature_distance__unknown():
    with pytest.raises(ValueError, match="unknown feature distance 'l3': choose smooth_l1, cosine or mse"):
        feature_distance(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 'l3')
