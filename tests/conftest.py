import copy
import gc
import random
import zlib

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

# At the sizes of these tests a second thread costs far more than it computes.
torch.set_num_threads(1)


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same weights in each run, whatever ran before. A fixture would come after those of wider scope."""
    seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """What several tests share draws from a stream of its own: which of them is the first to ask for it may change."""
    if fixturedef.scope == 'function':
        return (yield)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed(zlib.crc32(fixturedef.argname.encode()))
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@pytest.fixture(autouse=True)
def restore_default_scope(monkeypatch):
    """A Runner sets the scope in which later tests would look for their parts."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', copy.copy(DefaultScope._instance_dict))


@pytest.fixture
def free_memory():
    """For tests of large models, which lie in reference cycles and would fill the memory before Python looks."""
    yield
    gc.collect()
