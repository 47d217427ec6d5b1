import copy
import gc

import pytest
import torch
from mmengine.registry import DefaultScope

# At the sizes of these tests a second thread costs far more than it computes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def restore_default_scope(monkeypatch):
    """A Runner sets the scope in which later tests would look for their parts."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', copy.copy(DefaultScope._instance_dict))


@pytest.fixture
def free_memory():
    """For tests of large models, which lie in reference cycles and would fill the memory before Python looks."""
    yield
    gc.collect()
