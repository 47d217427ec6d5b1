import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

import mmhdistill.engine.optim.auto_amp as auto_amp
from tests.helpers import log_messages

CONFIG = dict(
    type='mmhdistill.auto_amp_optim_wrapper',
    optimizer=dict(type='SGD', lr=0.5),
    accumulative_counts=3,
    clip_grad=dict(max_norm=2.0))


class Recorded:
    """In place of AmpOptimWrapper, which cannot be made without a GPU."""

    def __init__(self, **kwargs):
        self.kwargs = kwargs


def test_auto_amp_optim_wrapper__cpu_is_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with log_messages() as messages:
        wrapper = build_optim_wrapper(nn.Linear(2, 2), CONFIG)
    assert type(wrapper) is OptimWrapper
    assert messages == ['training precision: float32 (no GPU)']
    with wrapper.optim_context(nn.Linear(2, 2)):
        assert not torch.is_autocast_enabled()
    assert wrapper._accumulative_counts == 3
    assert wrapper.clip_grad_kwargs == dict(max_norm=2.0)
    assert wrapper.get_lr()['lr'] == [0.5]


@pytest.mark.parametrize('has_bfloat16, dtype, message', [
    (True, 'bfloat16', 'training precision: bfloat16'),
    (False, 'float16', 'training precision: float16 with loss scaling (no bfloat16)'),
])
def test_auto_amp_optim_wrapper__gpu(has_bfloat16, dtype, message, monkeypatch):
    with log_messages() as messages:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        # An emulated bfloat16 is slow, so it must not count.
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation
                            or has_bfloat16)
        monkeypatch.setattr(auto_amp, 'AmpOptimWrapper', Recorded)
        wrapper = auto_amp.auto_amp_optim_wrapper(optimizer='the optimizer', accumulative_counts=3)
    assert wrapper.kwargs == dict(dtype=dtype, optimizer='the optimizer', accumulative_counts=3)
    assert messages == [message]


@pytest.mark.filterwarnings('ignore:.*GradScaler is enabled:UserWarning')
def test_auto_amp_optim_wrapper__the_real_class_takes_these_arguments(monkeypatch):
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    for dtype in ('bfloat16', 'float16'):
        wrapper = AmpOptimWrapper(dtype=dtype, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
        assert wrapper.cast_dtype == getattr(torch, dtype)
