import inspect

import torch
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from ...registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
def auto_amp_optim_wrapper(**kwargs) -> OptimWrapper:
    """Mixed precision where the device has it: bfloat16, else float16 with loss scaling, else (CPU) float32.

    Takes the arguments of mmengine's ``OptimWrapper`` and says once what it chose.
    """
    if not torch.cuda.is_available():
        wrapper, choice = OptimWrapper(**kwargs), 'float32 (no GPU)'
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        wrapper, choice = AmpOptimWrapper(dtype='bfloat16', **kwargs), 'bfloat16'
    else:
        wrapper, choice = AmpOptimWrapper(dtype='float16', **kwargs), 'float16 with loss scaling (no bfloat16)'
    MMLogger.get_current_instance().info(f'training precision: {choice}')
    return wrapper


# So that who asks what it takes, as the config guard does, is told.
auto_amp_optim_wrapper.__signature__ = inspect.signature(OptimWrapper)
