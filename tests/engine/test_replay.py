"""A recorded step again: with other samples, weights or random numbers it would be another one."""
import json
import math

import pytest
import torch
from mmengine.hooks import Hook

from mmhdistill.engine.replay import plain_model, replay
from mmhdistill.engine.runner import ResumableRunner
from tests.engine.resumable import BATCH, IMAGES, Images, config, output, run


class Marked(Images):
    """The image at a place of the first epoch has a pixel that no other has."""

    def __init__(self, place: int):
        self.index = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(3)).tolist()[place]

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == self.index:
            sample['inputs'][0, 0, 0] = -1e4
        return sample


class Switch(Hook):
    """As mmpretrain's of recipes and mmdet's of pipelines, which ask what epoch it is."""

    def before_train_epoch(self, runner):
        pass


class Root(Hook):
    """The root of zero, whose slope is infinite, is a loss of batches with the marked image."""

    def before_run(self, runner):
        model = plain_model(runner)
        plain = model.loss

        def loss(images):
            losses = plain(images)
            if (images < -50).any():
                losses['loss/root'] = (model.backbone.cls_token * 0).sum().sqrt()
            return losses

        model.loss = loss


def settings(place, counts, *hooks, **kwargs):
    return dict(
        # The random teachers of all processes are the same.
        randomness=dict(seed=3), hooks=(Root(), *hooks), param_scheduler=None,
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3), accumulative_counts=counts),
        train_dataloader=dict(batch_size=BATCH, num_workers=0, dataset=Marked(place),
                              sampler=dict(type='DefaultSampler', shuffle=True)), **kwargs)


@pytest.mark.parametrize('world_size, counts, place, rank, batch, iteration', [
    # Places are dealt out in turn. After two of four batches: no place of an epoch of one process, which has seven.
    (2, 1, 9, 1, 2, 2),
    # The first of the three batches of an update, which comes after the last of them.
    (1, 3, 6, 0, 3, 5)])
def test_replay__a_finite_loss_with_an_infinite_gradient(world_size, counts, place, rank, batch, iteration, tmp_path):
    run_settings = settings(place, counts)
    assert set(run(tmp_path, world_size, **run_settings)) == {0}, output(tmp_path)
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / 'nonfinite').glob('*.json')}
    assert sorted(found) == [f'iter_{iteration}_rank_{i}.json' for i in range(world_size)]
    record = found[f'iter_{iteration}_rank_{rank}.json']
    assert (record['iteration'], record['batch_iteration'], record['batch']) == (iteration, batch, batch)
    assert run_settings['train_dataloader']['dataset'].index in [index for index, _ in record['samples']]
    assert record['gradients'] == ['backbone.cls_token'] and record['losses']['loss/root'] == 0
    assert all(math.isfinite(x) for x in record['losses'].values()) and record['losses']['loss'] > 0

    def build(name):
        checkpoint = tmp_path / 'nonfinite' / record['checkpoint']
        return ResumableRunner(**config(tmp_path / name, **settings(place, counts, load_from=str(checkpoint))),
                               experiment_name=f'{tmp_path.name}-{name}')

    again = replay(build('again'), record)
    assert again['losses'] == record['losses']
    assert again['gradients'] == record['gradients']
    assert json.loads(json.dumps(again['layers'])) == record['layers']

    samples = [[(index + 1) % IMAGES, counters] for index, counters in record['samples']]
    for name, other in (('samples', dict(record, samples=samples)), ('seed', dict(record, seed=4)),
                        ('iteration', dict(record, batch_iteration=batch + 1)), ('rate', dict(record, keep_rate=0.5))):
        assert replay(build(name), other)['losses']['loss/feature'] != record['losses']['loss/feature'], name


def test_replay__hooks_that_may_have_switched_something_are_told(tmp_path, monkeypatch):
    """mmengine's and ours are not: what they change is in the record."""
    assert run(tmp_path, **settings(6, 1, Switch())) == [0], output(tmp_path)
    record = json.loads((tmp_path / 'nonfinite/iter_3_rank_0.json').read_text())
    said = []
    for hooks in ((Switch(), ), ()):
        checkpoint = str(tmp_path / 'nonfinite' / record['checkpoint'])
        runner = ResumableRunner(**config(tmp_path / 'again', **settings(6, 1, *hooks, load_from=checkpoint)),
                                 experiment_name=f'{tmp_path.name}-{len(hooks)}')
        monkeypatch.setattr(runner.logger, 'warning', said.append)
        assert replay(runner, record)['losses'] == record['losses']
    assert [text for text in said if 'before training' in text] == [
        'Switch: what hooks do before training or an epoch is not done again. If they had switched a pipeline or a '
        'loss by then, this is another step.']
