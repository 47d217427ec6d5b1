"""What the abstracts of Hybrid Distill and MOMA say, as comparisons of the study's models, and whether they hold."""
from math import sqrt
from typing import NamedTuple

UNITS = {'knn': 'k-NN', 'linear': 'linear probe', 'finetune': 'fine-tuned', 'nmi': 'NMI', 'distance': 'distance',
         'ms': 'time', 'mib': 'memory'}
ACCURACIES = ('knn', 'linear', 'finetune')
TEST_IMAGES = 10_000


class More(NamedTuple):
    """That ``a`` has more of ``measure`` than ``b``; with ``margin``, that it has not less by more than that.

    NMI and distance are means over the last third of the layers, or of ``layer``.
    """
    measure: str
    a: str
    b: str
    margin: float = 0.0
    layer: int | None = None


def late(values: list, layer: int | None = None) -> float:
    """Mean over heads and the last third of the layers, or of one layer."""
    chosen = values[round(2 / 3 * len(values)):] if layer is None else [values[layer]]
    heads = [head for layer in chosen for head in layer]
    return sum(heads) / len(heads)


class Results:
    """Of one size: cell -> what its runs have in their files, and ``costs`` by cell."""

    def __init__(self, runs: dict[str, list[dict]], costs: dict[str, dict]):
        self.runs, self.costs = runs, costs

    def values(self, cell: str, measure: str, layer: int | None = None) -> list[float]:
        """One a seed."""
        if measure in ('nmi', 'distance'):
            return [late(run[measure], layer) for run in self.runs[cell]]
        return [run[measure] for run in self.runs[cell]]

    def spread(self, measure: str, layer: int | None = None) -> float:
        """Standard deviation over seeds, pooled over the cells that have several."""
        variances = []
        for cell in self.runs:
            values = self.values(cell, measure, layer)
            if len(values) > 1:
                variances.append(sum((value - mean(values))**2 for value in values) / (len(values) - 1))
        return sqrt(mean(variances))

    def difference(self, claim: More) -> tuple[float, float]:
        """a - b and its standard error: spread over seeds and, of accuracies, the sampling of test images."""
        squares, means = 0.0, []
        for cell in (claim.a, claim.b):
            values = self.values(cell, claim.measure, claim.layer)
            means.append(mean(values))
            squares += self.spread(claim.measure, claim.layer)**2 / len(values)
            if claim.measure in ACCURACIES:
                squares += means[-1] * (100 - means[-1]) / TEST_IMAGES
        return means[0] - means[1], sqrt(squares)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def decide(results: Results, claim: More) -> tuple[str, str]:
    """Verdict and what was measured. Two standard errors decide; of time and memory, 5 %. [choice]"""
    name = UNITS[claim.measure] + ('' if claim.layer is None else f' of layer {claim.layer}')
    if claim.measure in ('ms', 'mib'):
        ratio = results.costs[claim.a][claim.measure] / results.costs[claim.b][claim.measure]
        return verdict(ratio - 1, 0.025), f'{name}, {claim.b} / {claim.a}: {1 / ratio:.2f}'
    value, error = results.difference(claim)
    form = '+.3f' if claim.measure == 'nmi' else '+.1f'
    return verdict(value + claim.margin, error), (
        f'{name}, {claim.a} - {claim.b}: {value:{form}} ± {error:{form[1:]}}')


def verdict(value: float, error: float) -> str:
    return 'holds' if value > 2 * error else 'does not hold' if value < -2 * error else 'not decided'


def judge(results: Results, parts: list[More]) -> tuple[str, list[str]]:
    """A claim holds where each of its comparisons does, and does not where one is the other way round."""
    found = [decide(results, part) for part in parts]
    verdicts = {each for each, _ in found}
    worst = next(each for each in ('does not hold', 'not decided', 'holds') if each in verdicts)
    return worst, [f'{text} ({each})' if len(verdicts) > 1 else text for each, text in found]


def claims(depth: int) -> dict[str, list[More]]:
    """Sentence -> comparisons that it stands for. [choice]"""
    cl = ('supervised', 'moco')
    masked, whole = 'Hybrid, input mask', 'Hybrid, no mask'
    others = ('FD', 'relations', 'MFR, depth 1', 'MFR, depth 8', 'MOMA, MoCo to MAE', 'MOMA, MAE to MoCo', 'MOMA, both')
    return {
        'Supervised and contrastive teachers attend farther than the MAE':
            [More('distance', name, 'mae') for name in cl],
        'They discriminate better':
            [More(measure, name, 'mae') for name in cl for measure in ('knn', 'linear')],
        'The attention of the MAE is more diverse in every layer':
            [More('nmi', 'mae', name, layer=layer) for name in cl for layer in range(depth)],
        'The attention of the MAE is more local in every layer':
            [More('distance', name, 'mae', layer=layer) for name in cl for layer in range(depth)],
        'A student of features alone inherits attention that is less diverse than an MAE\'s':
            [More('nmi', 'mae', 'FD')],
        'An asymmetric decoder makes attention more diverse':
            [More('nmi', 'MFR, depth 1', 'FD'), More('nmi', 'MFR, depth 8', 'MFR, depth 1')],
        'and costs discrimination':
            [More(measure, 'FD', 'MFR, depth 8') for measure in ('knn', 'linear')],
        'Relations of the MAE make the attention of the student more diverse':
            [More('nmi', whole, 'FD')],
        'Features of the supervised teacher let the student discriminate':
            [More(measure, whole, 'relations') for measure in ('knn', 'linear')],
        'Both together discriminate as features alone do, up to one point':
            [More(measure, whole, 'FD', margin=1.0) for measure in ACCURACIES],
        'Masking redundant tokens makes a step cheaper':
            [More(measure, whole, masked) for measure in ('ms', 'mib')],
        'and the student better':
            [More(measure, masked, whole) for measure in ACCURACIES],
        'and is better than masking tokens at random':
            [More(measure, masked, 'Hybrid, random mask') for measure in ACCURACIES],
        'Hybrid Distill is superior after fine-tuning':
            [More('finetune', masked, name) for name in (*others, 'random weights', 'random weights, longer')],
        'MOMA: a model that is taught by another kind is better than before':
            [More('finetune', 'MOMA, MoCo to MAE', 'mae'), More('finetune', 'MOMA, MAE to MoCo', 'moco')],
        'MOMA: a student of both is better than training as long from random weights':
            [More('finetune', 'MOMA, both', 'random weights, longer')],
        'MOMA: masking nine tenths makes a step cheaper than Hybrid Distill without a mask':
            [More(measure, whole, 'MOMA, both') for measure in ('ms', 'mib')],
    }
