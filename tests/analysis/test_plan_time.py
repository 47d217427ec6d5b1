"""Images, steps, learning rates and files of a run."""
import pytest

from mmhdistill.analysis.plan import plan
from mmhdistill.analysis.plan_text import as_text
from tests.helpers import write_images

from .conftest import HYBRID, load, tiny_config


def test_plan__time():
    found = plan(load(HYBRID), tflops=150)
    time, total = found['time'], found['flops']['this']['total']
    assert (time['gpus'], time['batch'], time['accumulated'], time['images_per_step']) == (8, 256, 1, 2048)
    assert (time['images'], time['iterations_per_epoch'], time['iterations']) == (1_281_167, 625, 187_500)
    assert time['lr'] == 1.2e-3
    assert time['seconds'] == pytest.approx(187_500 * 256 * total / 150e12)
    assert time['images_per_second'] == pytest.approx(150e12 / total)


@pytest.mark.parametrize('drop_last, gpus, per_epoch', [(True, 1, 2), (False, 1, 3), (True, 2, 1), (False, 2, 2)])
def test_plan__images_of_a_folder(tmp_path, drop_last, gpus, per_epoch):
    write_images(tmp_path, [f'{index}.png' for index in range(10)], size=8)
    cfg = tiny_config(auto_scale_lr=dict(base_batch_size=8))
    cfg.train_dataloader.drop_last = drop_last
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    time = plan(cfg, gpus=gpus)['time']
    assert (time['images'], time['images_source']) == (10, f'counted in {tmp_path}')
    assert (time['iterations_per_epoch'], time['iterations']) == (per_epoch, 2 * per_epoch)


def test_plan__images_that_nobody_knows():
    found = plan(tiny_config())
    assert found['time']['iterations'] is found['time']['seconds'] is found['disk']['logs'] is None
    assert 'unknown number of images an epoch (nowhere is not there: give --images)' in as_text(found)


def test_plan__counted_in_iterations():
    cfg = tiny_config(train_cfg=dict(type='IterBasedTrainLoop', max_iters=1000),
               default_hooks=dict(logger=dict(interval=50), checkpoint=dict(interval=300, by_epoch=False)))
    found = plan(cfg)
    assert (found['time']['epochs'], found['time']['iterations']) == (None, 1000)
    assert found['disk']['checkpoints'] == 4  # 300, 600, 900 and the last
    assert found['disk']['logs'] == 20 * 812
    assert plan(cfg, images=40)['time']['epochs'] == 100


@pytest.mark.parametrize('hook, kept', [
    (dict(interval=1), 10), (dict(interval=1, max_keep_ckpts=3), 3), (dict(interval=4), 3), (dict(interval=5), 2),
    (dict(interval=4, save_last=False), 2), (dict(interval=100, max_keep_ckpts=1), 1), (None, 0),
])
def test_plan__checkpoints(hook, kept):
    cfg = tiny_config(train_cfg=dict(max_epochs=10), default_hooks=dict(checkpoint=hook))
    found = plan(cfg, images=40)
    assert found['disk']['checkpoints'] == kept
    trained = found['parameters']['trained'] + sum(found['parameters']['losses'].values())
    # Weights and two states of each, step counters, and what was logged of 100 iterations.
    assert found['disk']['checkpoint'] == pytest.approx(12 * trained + 166 * 100, rel=0.01)


@pytest.mark.parametrize('gpus, accumulated, scale, rate, note', [
    (None, 1, False, 1e-3, None), (4, 1, False, 1e-3, None), (None, 2, False, 1e-3, None), (2, 2, False, 1e-3, None),
    (2, 1, False, 1e-3, '8 images make a step, and the learning rate is made for 16: set'),
    (2, 1, True, 5e-4, None), (3, 1, True, 7.5e-4, None), (8, 2, True, 4e-3, None)])
def test_plan__learning_rate_is_made_for_a_batch(gpus, accumulated, scale, rate, note):
    cfg = tiny_config(auto_scale_lr=dict(base_batch_size=16))
    cfg.optim_wrapper.accumulative_counts = accumulated
    found = plan(cfg, gpus, auto_scale_lr=scale)
    if gpus is None:
        assert found['time']['gpus'] == 4 // accumulated
    assert found['time']['images_per_step'] == found['time']['gpus'] * 4 * accumulated
    assert found['time']['lr'] == pytest.approx(rate)
    assert [text[:len(note)] for text in found['notes']] == [note] if note else found['notes'] == []


def test_plan__batch_that_cannot_be_split():
    with pytest.raises(ValueError, match='2048 images a step, which cannot be split over 3 GPUs equally: take'):
        plan(tiny_config(auto_scale_lr=dict(base_batch_size=2048)), gpus=3)


@pytest.mark.parametrize('images, message', [(3, '3 images make no full batch of 4'), (0, '--images is 0')])
def test_plan__refuses_too_few_images(images, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny_config(), images=images)
