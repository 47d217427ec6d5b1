import json
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from torch.utils.data import Dataset

import mmhdistill.engine  # noqa: F401
from mmhdistill.engine import KNNEvaluationHook
from mmhdistill.functional import knn_accuracy
from tests.helpers import tiny_distiller, tiny_student

LABELS = [0, 1, 2] * 10


class Images(Dataset):
    """Three classes of noise of other brightness; the first 24 are the bank."""
    metainfo = dict(classes=['a', 'b', 'c'])

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 120, (3, 32, 32), generator=generator) + 60 * LABELS[index]
        sample = DataSample().set_gt_label(LABELS[index])
        sample.set_metainfo(dict(split='bank' if index < 24 else 'query'))
        return dict(inputs=image.byte(), data_samples=sample)


def make_runner(folder, hooks, name='run', epochs=3, test=True):
    loader = dict(batch_size=6, num_workers=0, dataset=Images(), sampler=dict(type='DefaultSampler', shuffle=False),
                  collate_fn=dict(type='pseudo_collate'))
    return Runner(
        # Drop path makes training draw random numbers.
        model=tiny_distiller(backbone=tiny_student(drop_path_rate=0.5)),
        work_dir=str(folder / name),
        train_dataloader=loader,
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        **dict(test_dataloader=loader, test_cfg=dict(),
               test_evaluator=dict(type='mmhdistill.KNNMetric', k=5)) if test else {},
        custom_hooks=hooks,
        default_scope='mmpretrain',
        visualizer=dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
        log_level='WARNING',
        randomness=dict(seed=0),
        experiment_name=f'{folder.name}-{name}')


def reports(runner):
    lines = Path(runner.log_dir, 'vis_data/scalars.json').read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if 'knn/patch' in entry]


def test_evaluation__student_at_the_interval_teachers_once(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, [dict(type='mmhdistill.KNNEvaluationHook', interval=2)])
    calls = []
    original = type(runner.model)._predict_teachers
    monkeypatch.setattr(type(runner.model), '_predict_teachers',
                        lambda self, *args: calls.append(1) or original(self, *args))
    runner.train()
    # Before training, after the second epoch and after the last: 5 batches an epoch.
    found = reports(runner)
    assert [entry['step'] for entry in found] == [0, 10, 15]
    assert len(calls) == 5
    assert runner.model.training and not runner.model.predicts_teachers
    for entry in found:
        assert {name for name in entry if name.startswith('knn/')} == {'knn/patch', 'knn/cls', 'knn/clip', 'knn/mae'}
        assert all(entry[f'knn/{name}'] == found[0][f'knn/{name}'] for name in ('clip', 'mae'))
    # What is reported last is what the model has.
    model, samples = runner.model, [Images()[index] for index in range(30)]
    model.eval()
    images = model.data_preprocessor(dict(inputs=[sample['inputs'] for sample in samples]))['inputs']
    last = {'clip': model.teachers['clip'].spec.depth - 1, 'mae': model.teachers['mae'].spec.depth - 1}
    features = {'patch': torch.stack([sample.feature for sample in model.predict(images)])}
    for name, teacher in model.teachers.items():
        output = teacher(images, (4, 4), {last[name]: frozenset({'features'})})
        features[name] = output.patches(last[name], 'features').mean(dim=1)
    labels = torch.tensor(LABELS)
    for name, x in features.items():
        assert found[-1][f'knn/{name}'] == pytest.approx(knn_accuracy(x[:24], labels[:24], x[24:], labels[24:], k=5))


def test_evaluation__changes_nothing_in_training(tmp_path):
    weights = []
    for name, hooks in (('with', [dict(type='mmhdistill.KNNEvaluationHook', interval=1)]), ('without', [])):
        runner = make_runner(tmp_path, hooks, name, epochs=2)
        runner.train()
        weights.append(runner.model.state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_evaluation__without_a_test_loop_is_told(tmp_path):
    runner = make_runner(tmp_path, [dict(type='mmhdistill.KNNEvaluationHook')], test=False)
    with pytest.raises(ValueError, match='needs test_dataloader, test_cfg and test_evaluator'):
        runner.train()
    with pytest.raises(ValueError, match='give at least 1 epoch'):
        KNNEvaluationHook(0)
