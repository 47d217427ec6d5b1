import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

import mmhdistill.engine.optim.auto_amp as auto_amp
from mmhdistill.engine import BFloat16OptimWrapper
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


@pytest.mark.parametrize('has_bfloat16, given, precision', [
    (True, {}, 'bfloat16'),
    (False, {}, 'float16 with loss scaling (no bfloat16)'),
    (True, dict(dtype='float16'), 'float16 with loss scaling (as configured)'),
])
def test_auto_amp_optim_wrapper__gpu(has_bfloat16, given, precision, monkeypatch):
    with log_messages() as messages:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        # An emulated bfloat16 is slow, so it must not count.
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation
                            or has_bfloat16)
        monkeypatch.setattr(auto_amp, 'AmpOptimWrapper', Recorded)
        monkeypatch.setattr(auto_amp, 'BFloat16OptimWrapper', type('Other', (Recorded, ), {}))
        wrapper = auto_amp.auto_amp_optim_wrapper(optimizer='the optimizer', accumulative_counts=3, **given)
    expected = dict(optimizer='the optimizer', accumulative_counts=3)
    if precision == 'bfloat16':
        assert (type(wrapper).__name__, wrapper.kwargs) == ('Other', expected)
    else:
        assert (type(wrapper), wrapper.kwargs) == (Recorded, dict(expected, dtype='float16'))
    assert messages == [f'training precision: {precision}']


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', torch.float16])
def test_auto_amp_optim_wrapper__other_precisions_have_other_wrappers(dtype):
    with pytest.raises(ValueError, match="has dtype=.*: leave it out, or give 'float16'"):
        build_optim_wrapper(nn.Linear(2, 2), dict(CONFIG, dtype=dtype))


def test_auto_amp_optim_wrapper__tells_what_it_takes():
    assert list(inspect.signature(auto_amp.auto_amp_optim_wrapper).parameters) == [
        'optimizer', 'accumulative_counts', 'clip_grad', 'dtype']


@pytest.mark.filterwarnings('ignore:.*GradScaler is enabled:UserWarning')
def test_auto_amp_optim_wrapper__the_real_class_takes_these_arguments(monkeypatch):
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    wrapper = AmpOptimWrapper(dtype='float16', optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    assert wrapper.cast_dtype == torch.float16


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_bfloat16_optim_wrapper__autocasts_on_the_device_of_the_model(device, monkeypatch):
    made = []
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: made.append((args, kwargs)) or nullcontext())
    model = nn.Linear(2, 2)
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
    monkeypatch.setattr(model, 'parameters', lambda: iter([SimpleNamespace(device=torch.device(device, 0))]))
    with wrapper.optim_context(model):
        pass
    assert made == [((device, ), dict(dtype=torch.bfloat16))]


def test_bfloat16_optim_wrapper__nothing_is_scaled_and_no_step_left_out():
    model = nn.Linear(2, 2)
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), 1.0))
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.tensor([[1.0, 3.0]]))
    assert out.dtype == torch.bfloat16 and not torch.is_autocast_enabled('cpu')
    wrapper.update_params(out.float().sum())
    assert torch.equal(model.weight, before - torch.tensor([1.0, 3.0]))
    # Whatever watches gradients sees them as they are.
    assert not hasattr(wrapper, 'loss_scaler') and 'loss_scaler' not in wrapper.state_dict()


@pytest.mark.filterwarnings('ignore:.*GradScaler is enabled:UserWarning')
def test_bfloat16_optim_wrapper__resumes_a_run_whose_loss_was_scaled_and_the_other_way_round(monkeypatch):
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)

    def make(kind, **kwargs):
        return kind(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1, momentum=0.5), **kwargs)

    scaled = make(AmpOptimWrapper, dtype='float16', loss_scale=dict(init_scale=4.0))
    plain = make(BFloat16OptimWrapper)
    scaled.optimizer.param_groups[0]['lr'] = 0.25
    plain.load_state_dict(scaled.state_dict())
    assert plain.get_lr()['lr'] == [0.25]
    again = make(AmpOptimWrapper, dtype='float16')
    again.load_state_dict(plain.state_dict())
    assert again.get_lr()['lr'] == [0.25]
