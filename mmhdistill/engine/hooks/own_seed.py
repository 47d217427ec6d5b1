import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_seed(seed: int = 0) -> Iterator[None]:
    """Random numbers of python, numpy and torch (CPU and the present GPU) start from ``seed`` and are put back after.

    What a hook draws then changes nothing in training.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
