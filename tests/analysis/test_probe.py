import torch

from mmhdistill.analysis.probe import linear_probe_predict


def accuracy(x, labels):
    return (linear_probe_predict(x[:300], labels[:300], x[300:]) == labels[300:]).double().mean()


def test_linear_probe__separates_what_a_line_separates():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    labels = (x[:, 0] + 2 * x[:, 1] > 0).long()
    # Of very different scales, as features are: standardised first.
    x = x * torch.tensor([1000.0, 1e-3, 1.0, 1.0, 1.0]) + 7
    assert accuracy(x, labels) > 0.95
    # Which side of a circle no line tells.
    inside = (torch.randn(400, 2, generator=generator)).square().sum(dim=1)
    labels = (inside > inside.median()).long()
    assert accuracy(x, labels) < 0.7


def test_linear_probe__classes_of_the_queries():
    x, queries = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-2.0], [3.0], [-4.0]])
    assert linear_probe_predict(x, torch.tensor([5, 7]), queries).tolist() == [5, 7, 5]
