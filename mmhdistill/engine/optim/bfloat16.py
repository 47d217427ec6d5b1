from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from ...registry import OPTIM_WRAPPERS


# The second name is that of configs of former days.
@OPTIM_WRAPPERS.register_module(name=['BFloat16OptimWrapper', 'CPUAmpOptimWrapper'])
class BFloat16OptimWrapper(OptimWrapper):
    """bfloat16 autocast on the model's device, the CPU too, without loss scaling: bfloat16 has float32's range.

    mmengine's ``AmpOptimWrapper`` refuses the CPU, and scales the loss in any precision. A scaler skips steps of
    infinite gradients in silence, before :class:`mmhdistill.engine.NonFiniteSentinel` sees them.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
