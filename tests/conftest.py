import copy
import gc
import random

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

# At the sizes of these tests a second thread costs far more than it computes.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same weights in each run, whatever ran before. A fixture would come after those of wider scope."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restore_default_scope(monkeypatch):
    """A Runner sets the scope in which later tests would look for their parts."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', copy.copy(DefaultScope._instance_dict))


@pytest.fixture
def free_memory():
    """For tests of large models, which lie in reference cycles and would fill the memory before Python looks."""
    yield
    gc.collect()
