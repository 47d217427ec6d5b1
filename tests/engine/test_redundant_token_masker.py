import math

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmhdistill.engine import RedundantTokenMasker
from tests.helpers import tiny_distiller

EPOCHS, ITERS = 2, 5


class Images(Dataset):

    def __len__(self):
        return 2 * ITERS

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator))


class Recorder(Hook):
    """Rate of the masker and what was logged, after each iteration."""

    def __init__(self):
        self.rates, self.logged = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        scalars = [runner.message_hub.get_scalar(f'train/{name}').current() for name in ('keep_rate', 'kept_tokens')]
        self.rates.append(runner.model.masker.keep_rate)
        self.logged.append(tuple(scalars))


def make_runner(folder, hook, epochs=EPOCHS, model=None, **kwargs):
    return Runner(
        model=model or tiny_distiller(),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2, dataset=Images(), sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)),
        train_cfg=kwargs.pop('train_cfg', None) or dict(by_epoch=True, max_epochs=epochs),
        custom_hooks=[hook],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        default_scope='mmpretrain',
        log_level='WARNING',
        experiment_name=f'{folder.name}-{len(list(folder.parent.iterdir()))}',
        **kwargs)


def rates_of(folder, model=None, train_cfg=None, **hook):
    runner = make_runner(folder, dict(type='mmhdistill.RedundantTokenMasker', **hook), model=model, train_cfg=train_cfg)
    recorder = Recorder()
    runner.register_hook(recorder, priority='VERY_LOW')
    runner.train()
    assert [rate for rate, _ in recorder.logged] == recorder.rates
    return recorder


def test_constant__the_maskers_own_rate(tmp_path):
    recorder = rates_of(tmp_path)
    assert recorder.rates == [0.8] * 10
    # 16 patches: three stages of 0.8 leave round(16 * 0.512) = 8.
    assert recorder.logged == [(0.8, 8)] * 10


def test_constant__the_hooks_rate_goes_before_the_maskers(tmp_path):
    recorder = rates_of(tmp_path, keep_rate=0.5)
    assert recorder.logged == [(0.5, 2)] * 10


def test_linear__over_all_of_training(tmp_path):
    recorder = rates_of(tmp_path, schedule='linear', keep_rate=0.5)
    expected = [1 - 0.05 * step for step in range(10)]
    assert recorder.rates == pytest.approx(expected, abs=1e-12)
    # 16 r^3, rounded: 16 * .95^3 = 13.7, 11.7, 9.8, 8.2, 6.75, 5.5, 4.4, 3.5, 2.66.
    assert [kept for _, kept in recorder.logged] == [16, 14, 12, 10, 8, 7, 5, 4, 3, 3]
    assert [kept for _, kept in recorder.logged] == [math.floor(16 * rate**3 + 0.5) for rate in expected]


def test_linear__in_epochs(tmp_path):
    recorder = rates_of(tmp_path, schedule='linear', keep_rate=0.6, start=0.9, begin=0.4, end=1.4)
    # Two iterations of waiting, then five of falling.
    expected = [0.9, 0.9, 0.9, 0.84, 0.78, 0.72, 0.66, 0.6, 0.6, 0.6]
    assert recorder.rates == pytest.approx(expected, abs=1e-12)


def test_linear__in_iterations(tmp_path):
    recorder = rates_of(tmp_path, schedule='linear', keep_rate=0.6, start=0.9, begin=3, end=6, by_epoch=False)
    expected = [0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6]
    assert recorder.rates == pytest.approx(expected, abs=1e-12)


def test_linear__open_end_in_iterations(tmp_path):
    recorder = rates_of(tmp_path, schedule='linear', keep_rate=0.5, begin=5, by_epoch=False)
    assert recorder.rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6], abs=1e-12)


def test_cosine__in_epochs(tmp_path):
    recorder = rates_of(tmp_path, schedule='cosine', keep_rate=0.5, end=1)
    expected = [0.75 + 0.25 * math.cos(math.pi * min(step / 5, 1)) for step in range(10)]
    assert recorder.rates == pytest.approx(expected, abs=1e-12)
    assert recorder.rates[0] == 1
    assert recorder.rates[5:] == [0.5] * 5


def test_linear__training_by_iterations(tmp_path):
    recorder = rates_of(tmp_path, train_cfg=dict(by_epoch=False, max_iters=4), schedule='linear', keep_rate=0.6)
    assert recorder.rates == pytest.approx([1, 0.9, 0.8, 0.7], abs=1e-12)


def test_encoder_masking__logs_what_the_last_stage_keeps(tmp_path):
    masker = dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder', keep_rate=0.5)
    recorder = rates_of(tmp_path, model=tiny_distiller(masker=masker))
    # All, a half, a quarter of 16.
    assert recorder.logged == [(0.5, 4)] * 10


def test_resume__goes_on_at_the_same_rate(tmp_path):
    hook = dict(type='mmhdistill.RedundantTokenMasker', schedule='cosine', keep_rate=0.5)
    whole, first, second = Recorder(), Recorder(), Recorder()
    runner = make_runner(tmp_path / 'a', hook)
    runner.register_hook(whole, priority='VERY_LOW')
    runner.train()

    class Stop(Hook):

        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                raise KeyboardInterrupt

    runner = make_runner(tmp_path / 'b', hook)
    runner.register_hook(first, priority='VERY_LOW')
    runner.register_hook(Stop())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    runner = make_runner(tmp_path / 'b', hook, resume=True)
    runner.register_hook(second, priority='VERY_LOW')
    runner.train()
    assert len(first.rates) == len(second.rates) == ITERS
    assert first.rates + second.rates == whole.rates
    assert first.logged + second.logged == whole.logged


def test_before_train__model_without_masker(tmp_path):
    runner = make_runner(tmp_path, dict(type='mmhdistill.RedundantTokenMasker'), model=tiny_distiller(masker=None))
    with pytest.raises(ValueError, match='moves the keep rate of model.masker, but HybridDistiller has no masker'):
        runner.train()


@pytest.mark.parametrize('setting, message', [
    (dict(keep_rate=0.0), r'the keep rate must lie in \(0, 1\], got 0\.0'),
    (dict(keep_rate=1.5), r'got 1\.5'),
    (dict(start=0), r'the keep rate must lie in \(0, 1\], got 0'),
    (dict(schedule='step'), "unknown schedule 'step': choose constant, linear or cosine"),
    (dict(begin=3, end=3), 'the ramp must end after it begins, got begin=3 and end=3'),
    (dict(begin=3, end=1), 'got begin=3 and end=1'),
])
def test_init__bad_arguments(setting, message):
    with pytest.raises(ValueError, match=message):
        RedundantTokenMasker(**setting)
