import math

import pytest

from mmhdistill.functional import ramp


@pytest.mark.parametrize('kind, progress, want', [
    ('constant', 0.0, 0.7),
    ('constant', 0.4, 0.7),
    ('linear', 0.0, 1.0),
    ('linear', 0.25, 0.925),
    ('linear', 1.0, 0.7),
    ('cosine', 0.0, 1.0),
    ('cosine', 0.25, 1.0 - 0.3 * (1 - math.sqrt(0.5)) / 2),
    ('cosine', 0.5, 0.85),
    ('cosine', 1.0, 0.7),
])
def test_ramp__closed_form(kind, progress, want):
    assert ramp(progress, 1.0, 0.7, kind) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize('kind', ['linear', 'cosine'])
def test_ramp__clamped_outside(kind):
    assert ramp(-0.5, 1.0, 0.7, kind) == pytest.approx(1.0, rel=1e-12)
    assert ramp(3.0, 1.0, 0.7, kind) == pytest.approx(0.7, rel=1e-12)


def test_ramp__unknown_kind():
    with pytest.raises(ValueError, match="unknown schedule 'step': choose constant, linear or cosine"):
        ramp(0.5, 1.0, 0.7, 'step')
