import os

import pytest
import torch
from mmengine.evaluator import Evaluator

from mmhdistill.evaluation import KNNMetric, knn_metric
from mmhdistill.functional import knn_accuracy
from tests.helpers import spawn


def make_samples(number=60, with_cls=True, classes=3):
    """Every third image is a query; features are noisy class centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 8, generator=generator)
    samples = []
    for index in range(number):
        label = index % classes
        sample = dict(split='query' if index // classes % 3 == 2 else 'bank', gt_label=torch.tensor([label]))
        sample['feature'] = centres[label] + 2 * torch.randn(8, generator=generator)
        if with_cls:
            sample['cls_feature'] = centres[label] + torch.randn(8, generator=generator)
        samples.append(sample)
    return samples


def evaluate(samples, batch=7, **kwargs):
    metric = KNNMetric(**kwargs)
    for start in range(0, len(samples), batch):
        metric.process(None, samples[start:start + batch])
    return metric.evaluate(len(samples))


def expected(samples, name, **kwargs):
    parts = []
    for split in ('bank', 'query'):
        chosen = [sample for sample in samples if sample['split'] == split]
        parts.append(torch.stack([sample[name] for sample in chosen]))
        parts.append(torch.cat([sample['gt_label'] for sample in chosen]))
    return knn_accuracy(*parts, **kwargs)


def test_evaluate__equals_the_function():
    samples = make_samples()
    found = evaluate(samples)
    assert found == {'knn/patch': expected(samples, 'feature', k=20, temperature=0.07),
                     'knn/cls': expected(samples, 'cls_feature', k=20, temperature=0.07)}
    assert 34 < found['knn/patch'] < found['knn/cls'] < 100


@pytest.mark.parametrize('k, temperature', [(1, 0.07), (5, 10.0), (40, 0.01)])
def test_evaluate__arguments_are_passed_on(k, temperature):
    samples = make_samples()
    found = evaluate(samples, k=k, temperature=temperature, prefix='mine')
    assert found == {'mine/patch': expected(samples, 'feature', k=k, temperature=temperature),
                     'mine/cls': expected(samples, 'cls_feature', k=k, temperature=temperature)}


def test_process__keeps_no_more_than_the_features():
    tokens = torch.randn(4, 17, 8)
    metric = KNNMetric()
    metric.process(None, [dict(split='bank', gt_label=0, feature=x[1:].mean(0), cls_feature=x[0]) for x in tokens])
    for result in metric.results:
        assert {x.untyped_storage().nbytes() for x in result['features'].values()} == {8 * 4}


def test_evaluate__by_hand():
    bank = [(1.0, 0.0, 0), (0.0, 1.0, 1), (-1.0, 0.0, 2)]
    # The nearest images are of class 0, 1, 2 and 2.
    query = [(3.0, 1.0, 5), (0.1, 0.2, 1), (-1.0, -1.0, 0), (-9.0, 8.0, 1)]
    samples = [dict(split=split, gt_label=label, feature=torch.tensor([x, y]))
               for split, rows in dict(bank=bank, query=query).items() for x, y, label in rows]
    assert evaluate(samples, k=1) == {'knn/patch': 25.0}


def test_evaluate__model_without_class_token():
    samples = make_samples(with_cls=False)
    assert list(evaluate(samples)) == ['knn/patch']


def test_evaluate__half_precision_features_are_compared_in_single():
    samples = make_samples()
    halves = [{**sample, 'feature': sample['feature'].half(), 'cls_feature': sample['cls_feature'].half()}
              for sample in samples]
    rounded = [{**sample, 'feature': sample['feature'].float(), 'cls_feature': sample['cls_feature'].float()}
               for sample in halves]
    assert evaluate(halves) == evaluate(rounded)


def test_evaluate__padding_of_the_last_batch_is_left_out():
    samples = make_samples()
    metric = KNNMetric()
    # A distributed sampler repeats the first images at the end.
    metric.process(None, samples + samples[:4])
    assert metric.evaluate(len(samples)) == evaluate(samples)


def test_evaluate__neighbours_are_searched_on_the_device_of_the_process(monkeypatch):
    found = []

    def accuracy(*parts, **kwargs):
        found.append([(part.device.type, tuple(part.shape)) for part in parts])
        return 0.0

    monkeypatch.setattr(knn_metric, 'get_device', lambda: 'meta')
    monkeypatch.setattr(knn_metric, 'knn_accuracy', accuracy)
    evaluate(make_samples(with_cls=False))
    # A third of 60 are queries: the last of each nine's three.
    assert found == [[('meta', shape) for shape in ((42, 8), (42, ), (18, 8), (18, ))]]


def evaluate_elsewhere(rank, folder):
    """Every other sample, as a distributed sampler gives them, from a current folder of its own."""
    (folder / f'current{rank}').mkdir()
    os.chdir(folder / f'current{rank}')
    samples = make_samples()
    metric = KNNMetric(collect_dir=str(folder / 'shared/disk'))
    metric.process(None, samples[rank::2])
    found = metric.evaluate(len(samples))
    assert found == evaluate_whole(samples)
    assert os.listdir() == []


def evaluate_whole(samples):
    return {f'knn/{name}': expected(samples, key, k=20, temperature=0.07)
            for name, key in (('patch', 'feature'), ('cls', 'cls_feature'))}


@pytest.mark.slow
def test_evaluate__in_a_folder_that_processes_share(tmp_path):
    (tmp_path / 'shared/disk').mkdir(parents=True)
    (tmp_path / 'shared/disk/mine.txt').touch()
    spawn(evaluate_elsewhere, tmp_path, tmp_path)
    # What was there stays, and what was left there is gone.
    assert os.listdir(tmp_path / 'shared/disk') == ['mine.txt']


def test_init__a_folder_is_for_the_cpu(tmp_path):
    with pytest.raises(ValueError, match="only be configured when `collect_device='cpu'`"):
        KNNMetric(collect_dir=str(tmp_path), collect_device='gpu')


def test_evaluate__one_process_needs_no_folder(tmp_path):
    samples = make_samples()
    assert evaluate(samples, collect_dir=str(tmp_path / 'none')) == evaluate_whole(samples)
    assert os.listdir(tmp_path) == []


def test_evaluate__built_by_name():
    evaluator = Evaluator(dict(type='mmhdistill.KNNMetric', k=3))
    samples = make_samples()
    evaluator.process(samples)
    assert evaluator.evaluate(len(samples))['knn/patch'] == expected(samples, 'feature', k=3)


def test_process__of_a_model_that_gives_no_features():
    sample = make_samples(1)[0]
    del sample['feature']
    with pytest.raises(ValueError, match='needs a model that gives features, as a distiller does'):
        KNNMetric().process(None, [sample])


@pytest.mark.parametrize('split', [None, 'train'])
def test_process__sample_of_no_split(split):
    sample = make_samples(1)[0]
    del sample['split']
    if split:
        sample['split'] = split
    with pytest.raises(ValueError, match=f"needs samples of split 'bank' or 'query', got {split!r}: set split"):
        KNNMetric().process(None, [sample])


@pytest.mark.parametrize('split, counts', [('bank', (4, 0)), ('query', (0, 4))])
def test_evaluate__one_split_alone(split, counts):
    samples = [{**sample, 'split': split} for sample in make_samples(4)]
    with pytest.raises(ValueError, match=f"got {counts[0]} of split 'bank' and {counts[1]} of split 'query'"):
        evaluate(samples)


def test_evaluate__bank_smaller_than_k():
    with pytest.raises(ValueError, match='k-NN with k=20 needs at least 20 bank images, got 6'):
        evaluate(make_samples(9))
