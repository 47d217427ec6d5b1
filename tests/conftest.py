import gc

import pytest
import torch

# At the sizes of these tests a second thread costs far more than it computes.
torch.set_num_threads(1)


@pytest.fixture
def free_memory():
    """For tests of large models, which lie in reference cycles and would fill the memory before Python looks."""
    yield
    gc.collect()
