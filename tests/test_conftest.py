"""What a test draws depends neither on the tests before it nor on who built what they share."""
import numpy as np
import pytest
import torch

from .conftest import seed


def draw():
    return np.random.rand(), torch.rand(()).item()


@pytest.fixture(scope='module')
def shared():
    return draw()


@pytest.fixture(scope='module')
def other():
    return draw()


@pytest.mark.parametrize('time', ['first', 'second'])
def test_draws(shared, time):
    drawn = draw()
    seed(0)
    assert drawn == draw()
    assert shared != drawn


def test_draws__shared_parts_differ(shared, other):
    assert not set(shared) & set(other)
