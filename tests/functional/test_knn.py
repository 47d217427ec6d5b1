import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mmhdistill.functional import knn_accuracy, knn_predict


def clusters(count, seed, classes=4, width=8):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    noise = torch.randn(count, width, generator=generator)
    length = torch.rand(count, 1, generator=generator) + 0.5
    return (centres[labels] + 1.2 * noise) * length, labels


@pytest.mark.parametrize('k, temperature, block', [(20, 0.07, 1024), (20, 0.07, 7), (5, 0.5, 64), (1, 0.07, 64)])
def test_knn__equals_scikit_learn(k, temperature, block):
    (bank, bank_labels), (queries, query_labels) = clusters(200, seed=1), clusters(60, seed=2)
    reference = KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp((1 - d) / temperature))
    reference.fit(bank.numpy(), bank_labels.numpy())
    want = reference.predict(queries.numpy())
    got = knn_predict(bank, bank_labels, queries, num_classes=4, k=k, temperature=temperature, block=block)
    assert got.tolist() == want.tolist()
    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature, block=block)
    assert accuracy == pytest.approx(100 * (want == query_labels.numpy()).mean(), abs=1e-9)
    assert 30 < accuracy < 100


def test_knn_predict__weights_decide():
    # Class 0 has one neighbour at similarity 1, class 1 two at .6: e^(1/t) > 2 e^(.6/t) for t < .577.
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]])
    assert knn_predict(bank, labels, query, num_classes=2, k=3, temperature=0.55).tolist() == [0]
    assert knn_predict(bank, labels, query, num_classes=2, k=3, temperature=0.60).tolist() == [1]


def test_knn_accuracy__class_absent_from_the_bank_counts_as_wrong():
    bank, queries = torch.eye(2), torch.eye(2)
    assert knn_accuracy(bank, torch.tensor([0, 1]), queries, torch.tensor([0, 5]), k=1) == 50.0


def test_knn_predict__bank_too_small():
    with pytest.raises(ValueError, match='k=20 needs at least 20 bank images, got 19'):
        knn_predict(torch.ones(19, 2), torch.zeros(19, dtype=torch.long), torch.ones(1, 2), num_classes=2)


def test_knn_predict__low_temperature_does_not_overflow():
    query = torch.tensor([[0.0, 0.5, 1.0]])
    got = knn_predict(torch.eye(3), torch.arange(3), query, num_classes=3, k=3, temperature=0.005)
    assert got.tolist() == [2]


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_knn_predict__features_that_are_not_finite(value):
    good, bad = torch.eye(3), torch.eye(3) * value
    for bank, queries in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match='not finite: the model has diverged'):
            knn_predict(bank, torch.arange(3), queries, num_classes=3, k=1)


def test_knn_predict__a_large_bank_is_compared_with_fewer_queries_at_a_time(monkeypatch):
    (bank, labels), (queries, _) = clusters(200, seed=1), clusters(60, seed=2)
    expected = knn_predict(bank, labels, queries, num_classes=4)
    sizes, topk = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, 'topk', lambda x, k, dim: sizes.append(x.shape) or topk(x, k, dim))
    # Room for the similarities of 16 queries and part of another's.
    monkeypatch.setattr('mmhdistill.functional.knn._SIMILARITIES', 16 * 200 + 100)
    assert torch.equal(knn_predict(bank, labels, queries, num_classes=4), expected)
    assert sizes == [(16, 200)] * 3 + [(12, 200)]
    # One query is compared in any case.
    monkeypatch.setattr('mmhdistill.functional.knn._SIMILARITIES', 100)
    assert torch.equal(knn_predict(bank, labels, queries[:5], num_classes=4), expected[:5])
