"""What each quick start compares: which models, how they are named and drawn, and what the comparison is to show."""
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Name in tables and figures, Okabe-Ito colour (told apart by colour-blind readers and in grey) and marker.

    Args:
        start: of a student, the model whose weights it starts from.
    """
    label: str
    colour: str
    marker: str
    start: str = 'random'


@dataclass(frozen=True)
class Study:
    """Work folder -> model; ``claims`` maps results to what they are meant to show, each with whether they do."""
    teachers: dict[str, Model]
    students: dict[str, Model]
    claims: Callable[[dict], dict[str, bool]]

    @property
    def labels(self) -> dict[str, str]:
        """Label by key of the results, in the order of the table."""
        return {'pixels': 'raw pixels', 'random': 'student, random weights',
                **{name: model.label for name, model in {**self.teachers, **self.students}.items()}}


def _claims_of_hybrid(results: dict) -> dict[str, bool]:
    hybrid, cl_only, random = results['hybrid'], results['cl-only'], results['random']
    layers = results['relation_layers']

    def mean_nmi(result: dict) -> float:
        return sum(result['nmi'][layer] for layer in layers) / len(layers)

    claims = {
        'Hybrid k-NN is 20 points above the random student': hybrid['knn'] >= random['knn'] + 20,
        'Hybrid k-NN is above raw pixels': hybrid['knn'] > results['pixels']['knn'],
        "Hybrid NMI at the relation layers is 3 times that of the student of teacher 1's features":
            mean_nmi(hybrid) >= 3 * mean_nmi(cl_only),
        "Hybrid relations are nearer to the MAE's than those of the student of teacher 1's features":
            hybrid['relation_kl'] < cl_only['relation_kl'],
    }
    for name in ('loss/feature', 'loss/relation'):
        first, last = hybrid['losses'].get(name, (0.0, 1.0))
        claims[f'{name} falls by 30 %'] = last <= 0.7 * first
    return claims


def _claims_of_moma(results: dict) -> dict[str, bool]:
    floor = results['random']['knn'] + 15
    layer = results['relation_layers'][-1]
    nmi = {name: results[name]['nmi'][layer] for name in ('mae', 'moco', 'moco-to-mae', 'mae-to-moco')}
    claims = {
        'k-NN of the MAE taught by MoCo v3 is 15 points above the random student':
            results['moco-to-mae']['knn'] >= floor,
        'k-NN of the student of both is 15 points above the random student': results['moco-mae']['knn'] >= floor,
        "attention of the MAE taught by MoCo v3 becomes like its teacher's: NMI at most half the MAE's":
            nmi['moco-to-mae'] <= 0.5 * nmi['mae'],
        "attention of the MoCo v3 taught by MAE becomes more diverse: NMI at least twice the MoCo v3's":
            nmi['mae-to-moco'] >= 2 * nmi['moco'],
    }
    for name in ('moco-to-mae', 'mae-to-moco', 'moco-mae'):
        for key, (first, last) in results[name]['losses'].items():
            claims[f'{name}: {key} falls by 30 %'] = last <= 0.7 * first
    return claims


_MAE = Model('teacher 2: MAE', '#0072B2', 'D')
STUDIES = {
    'hybrid': Study(
        teachers={'supervised': Model('teacher 1: supervised ViT', '#E69F00', 's'), 'mae': _MAE},
        students={'cl-only': Model("student of teacher 1's features", '#D55E00', 'v'),
                  'hybrid': Model('Hybrid Distill student', '#009E73', 'o')},
        claims=_claims_of_hybrid),
    'moma': Study(
        teachers={'moco': Model('teacher 1: MoCo v3', '#E69F00', 's'), 'mae': _MAE},
        students={'moco-to-mae': Model('MAE taught by MoCo v3', '#D55E00', 'v', start='mae'),
                  'mae-to-moco': Model('MoCo v3 taught by MAE', '#CC79A7', '^', start='moco'),
                  'moco-mae': Model('student of both', '#009E73', 'o')},
        claims=_claims_of_moma),
}
