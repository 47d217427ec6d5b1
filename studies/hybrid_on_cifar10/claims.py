"""What Hybrid Distill and MOMA claim, as comparisons of the study's models, and whether it holds."""
from math import exp, log, sqrt
from statistics import mean, median
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

UNITS = {'knn': 'k-NN', 'linear': 'linear probe', 'finetune': 'fine-tuned', 'nmi': 'NMI', 'distance': 'distance',
         'ms': 'time', 'mib': 'memory'}
ACCURACIES = ('knn', 'linear', 'finetune')
LEVEL = 0.025
LABELS = {'supervised': 'supervised ViT', 'moco': 'MoCo v3', 'mae': 'MAE', 'moco_longer': 'MoCo v3, longer',
          'mae_longer': 'MAE, longer'}


class More(NamedTuple):
    """That ``a`` has more of ``measure`` than ``b``; with ``margin``, of accuracies, that it has not less by more.

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

    def right(self, cell: str, measure: str) -> np.ndarray:
        """Of each test image, in percent, how many seeds classify it rightly."""
        packed = [np.frombuffer(bytes.fromhex(run['right'][measure]), np.uint8) for run in self.runs[cell]]
        return 100 * np.mean([np.unpackbits(bits) for bits in packed], axis=0)

    def _on_scale(self, cell: str, measure: str, layer: int | None) -> list[float]:
        """Values of which differences are told: logarithms of NMI and distance, which are positive and far apart."""
        values = self.values(cell, measure, layer)
        return values if measure in ACCURACIES else [log(value) for value in values]

    def spread(self, measure: str, layer: int | None = None) -> tuple[float, int]:
        """Standard deviation over seeds, pooled over the cells that have several, and its degrees of freedom; of NMI
        and distance that of their logarithms."""
        squares, freedom = 0.0, 0
        for cell, runs in self.runs.items():
            if len(runs) > 1 and measure in runs[0]:
                values = self._on_scale(cell, measure, layer)
                squares += sum((value - mean(values))**2 for value in values)
                freedom += len(values) - 1
        return sqrt(squares / freedom), freedom

    def difference(self, claim: More) -> tuple[float, float, int]:
        """a - b, of NMI and distance log(a / b), its standard error and the degrees of freedom of that.

        The error has the spread over seeds and, of accuracies, the sampling of test images, which are the same for a
        and b.
        """
        deviation, freedom = self.spread(claim.measure, claim.layer)
        a, b = (self._on_scale(cell, claim.measure, claim.layer) for cell in (claim.a, claim.b))
        squares = deviation**2 * (1 / len(a) + 1 / len(b))
        if claim.measure in ACCURACIES:
            images = self.right(claim.a, claim.measure) - self.right(claim.b, claim.measure)
            squares += images.var(ddof=1) / len(images)
        return mean(a) - mean(b), sqrt(squares), freedom


def decide(results: Results, claim: More, of: int = 1) -> tuple[str, str]:
    """Verdict on one of ``of`` comparisons, and what was measured.

    It holds, or is the other way round, at a one-sided level of 2.5 %; the latter divided among the comparisons of a
    claim, which one of them can overturn. Of time and memory it does where all rounds of one are below all of the
    other. [choice]
    """
    one, other = (LABELS.get(cell, cell) for cell in (claim.a, claim.b))
    name = UNITS[claim.measure] + ('' if claim.layer is None else f' of layer {claim.layer}')
    if claim.measure in ('ms', 'mib'):
        a, b = (results.costs[cell][claim.measure] for cell in (claim.a, claim.b))
        # What the nearest rounds differ by, in favour of the claim or against it.
        apart = max(min(a) - max(b), 0) + min(max(a) - min(b), 0)
        return verdict(apart, 0, 0), f'{name}, {other} / {one}: {median(b):.0f} / {median(a):.0f}'
    value, error, freedom = results.difference(claim)
    bounds = [student_t.ppf(1 - level, freedom) * error for level in (LEVEL, LEVEL / of)]
    if claim.measure in ACCURACIES:
        measured = f'{one} - {other}: {value:+.2f} ± {error:.2f}'
    else:
        measured = f'{one} / {other}: {exp(value):.2f}, log {value:+.2f} ± {error:.2f}'
    return verdict(value + claim.margin, *bounds), f'{name}, {measured}'


def verdict(value: float, to_hold: float, to_fail: float) -> str:
    return 'holds' if value > to_hold else 'does not hold' if value < -to_fail else 'not decided'


def judge(results: Results, parts: list[More]) -> tuple[str, list[str]]:
    """A claim holds where each of its comparisons does, and does not where one is the other way round."""
    found = [decide(results, part, len(parts)) for part in parts]
    verdicts = {each for each, _ in found}
    worst = next(each for each in ('does not hold', 'not decided', 'holds') if each in verdicts)
    return worst, [f'{text} ({each})' if len(verdicts) > 1 else text for each, text in found]


def claims(depth: int) -> dict[str, list[More]]:
    """Sentence -> comparisons that it stands for. [choice] What is marked [ours] no abstract claims."""
    cl, teachers = ('supervised', 'moco'), ('supervised', 'moco', 'mae')
    masked, whole = 'Hybrid, input mask', 'Hybrid, no mask'
    # Student of features and relations, and of those features alone.
    pairs = ((whole, 'FD'), ('Hybrid of MoCo, no mask', 'FD of MoCo'))
    # More of the asymmetric design from one to the next; the first masks as the others do and has no decoder.
    decoders = ('FD, 75 % masked', 'MFR, depth 1', 'MFR, depth 8')
    momas = ('MOMA, MoCo to MAE', 'MOMA, MAE to MoCo', 'MOMA, both')
    others = ('FD', 'FD of MoCo', 'relations', *decoders, *momas, 'random weights', 'random weights, longer', *teachers)
    return {
        'Supervised and contrastive teachers attend farther than the MAE':
            [More('distance', name, 'mae') for name in cl],
        'They discriminate better':
            [More(measure, name, 'mae') for name in cl for measure in ('knn', 'linear')],
        'The attention of the MAE is more diverse in every layer':
            [More('nmi', 'mae', name, layer=layer) for name in cl for layer in range(depth)],
        'The attention of the MAE is more local in every layer':
            [More('distance', name, 'mae', layer=layer) for name in cl for layer in range(depth)],
        "Students of features alone inherit attention that is less diverse than the MAE's":
            [More('nmi', 'mae', features) for _, features in pairs],
        'An asymmetric decoder makes attention more diverse':
            [More('nmi', deeper, other) for other, deeper in zip(decoders, decoders[1:])],
        'and costs discrimination':
            [More(measure, other, deeper) for other, deeper in zip(decoders, decoders[1:])
             for measure in ('knn', 'linear')],
        'Relations of the MAE make the attention of the student more diverse':
            [More('nmi', both, features) for both, features in pairs],
        'in its last layer too, whose relations no loss trains [ours]':
            [More('nmi', both, features, layer=depth - 1) for both, features in pairs],
        'Features let the student discriminate':
            [More(measure, both, 'relations') for both, _ in pairs for measure in ('knn', 'linear')],
        'Both together discriminate as features alone do, up to one point [ours]':
            [More(measure, both, features, margin=1.0) for both, features in pairs for measure in ACCURACIES],
        'Masking redundant tokens makes a step cheaper':
            [More(measure, whole, masked) for measure in ('ms', 'mib')],
        'and the student better [ours]':
            [More(measure, masked, whole) for measure in ACCURACIES],
        'and is better than masking tokens at random [ours]':
            [More(measure, masked, 'Hybrid, random mask') for measure in ACCURACIES],
        'and progressively better than at once [ours]':
            [More(measure, masked, 'Hybrid, one stage') for measure in ACCURACIES],
        'Hybrid Distill is superior after fine-tuning, with the supervised teacher':
            [More('finetune', masked, name) for name in others],
        'and with the MoCo v3, among what has seen no labels':
            [More('finetune', 'Hybrid of MoCo, no mask', name) for name in ('FD of MoCo', *momas, 'moco', 'mae')],
        'MOMA: a model that is taught by another kind is better than one that goes on by itself [ours]':
            [More('finetune', 'MOMA, MoCo to MAE', 'mae_longer'), More('finetune', 'MOMA, MAE to MoCo', 'moco_longer')],
        'MOMA: a student of both is better than training as long from random weights [ours]':
            [More('finetune', 'MOMA, both', 'random weights, longer')],
        'MOMA: masking nine tenths makes a step cheaper than Hybrid Distill without a mask [ours]':
            [More(measure, whole, 'MOMA, both') for measure in ('ms', 'mib')],
    }
