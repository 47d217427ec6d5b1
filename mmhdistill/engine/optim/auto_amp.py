import inspect

import torch
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from ...registry import OPTIM_WRAPPERS
from .bfloat16 import BFloat16OptimWrapper


@OPTIM_WRAPPERS.register_module()
def auto_amp_optim_wrapper(dtype: str | None = None, **kwargs) -> OptimWrapper:
    """Mixed precision where the device has it: bfloat16, else float16 with loss scaling, else (CPU) float32.

    Takes the arguments of mmengine's ``OptimWrapper`` too, and says once what it chose.

    Args:
        dtype: ``'float16'`` never takes bfloat16: for detection, whose boxes need more than 8 significant bits, and
            mmcv's RoIAlign, which has no kernel for it.

    Raises:
        ValueError: another ``dtype``.
    """
    if dtype not in (None, 'float16'):
        raise ValueError(f"auto_amp_optim_wrapper has dtype={dtype!r}: leave it out, or give 'float16'; for bfloat16 "
                         'on any device take mmhdistill.BFloat16OptimWrapper.')
    if not torch.cuda.is_available():
        wrapper, choice = OptimWrapper(**kwargs), 'float32 (no GPU)'
    elif dtype is None and torch.cuda.is_bf16_supported(including_emulation=False):
        wrapper, choice = BFloat16OptimWrapper(**kwargs), 'bfloat16'
    else:
        why = 'as configured' if dtype else 'no bfloat16'
        wrapper, choice = AmpOptimWrapper(dtype='float16', **kwargs), f'float16 with loss scaling ({why})'
    MMLogger.get_current_instance().info(f'training precision: {choice}')
    return wrapper


# So that who asks what it takes, as the config guard does, is told.
auto_amp_optim_wrapper.__signature__ = inspect.Signature([
    *inspect.signature(OptimWrapper).parameters.values(),
    inspect.Parameter('dtype', inspect.Parameter.KEYWORD_ONLY, default=None)])
