import copy
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mmhdistill.analysis.quickstart import format_table, kept_tokens, loss_curves
from mmhdistill.analysis.quickstart_figure import draw
from mmhdistill.analysis.studies import STUDIES
from tests.helpers import build_distiller

RESULTS = dict(
    pixels=dict(knn=20.0),
    random=dict(knn=30.0, nmi=[.1, .1, .1, .1], relation_kl=2.0),
    supervised=dict(knn=60.0, nmi=[.04, .03, .02, .01]),
    mae=dict(knn=40.0, nmi=[.02, .09, .03, .05]),
    hybrid=dict(knn=50.0, knn_cls=42.0, nmi=[.0, .06, .06, .0], relation_kl=0.1,
                losses={'loss/feature': [1.0, 0.5], 'loss/relation': [2.0, 0.2]}),
    relation_layers=[1, 2])
RESULTS['cl-only'] = dict(knn=55.0, nmi=[.5, .01, .03, .5], relation_kl=1.5, losses={'loss/feature': [1.0, 0.2]})
MOMA = {
    'pixels': dict(knn=20.0),
    'random': dict(knn=30.0, nmi=[.1, .1, .1, .1], relation_kl=2.0),
    'moco': dict(knn=50.0, nmi=[.04, .03, .02, .01]),
    'mae': dict(knn=40.0, nmi=[.02, .09, .12, .05]),
    'moco-to-mae': dict(knn=45.0, nmi=[.1, .1, .06, .1], relation_kl=0.5, losses={'loss/moco': [1.0, 0.5]}),
    'mae-to-moco': dict(knn=48.0, nmi=[.0, .0, .04, .0], relation_kl=0.4, losses={'loss/mae': [0.8, 0.4]}),
    'moco-mae': dict(knn=45.0, nmi=[.1] * 4, relation_kl=0.3, losses={'loss/moco': [1.2, 0.6], 'loss/mae': [0.9, 0.3]}),
    'relation_layers': [2],
}


def verdicts(results, method='hybrid'):
    return STUDIES[method].claims(results)


def table_of(results, method):
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in format_table(results, STUDIES[method]).splitlines() if line.startswith('|')]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: dict(zip(rows[0], row)) for row in rows}


def changed(*path, value, results=RESULTS):
    results = copy.deepcopy(results)
    node = results
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return results


def test_verdicts__all_hold_at_the_margin():
    # 50 = 30 + 20, and .06 = 3 x .02 at the relation layers alone.
    assert list(verdicts(RESULTS).values()) == [True] * 6


@pytest.mark.parametrize('path, value, claim', [
    (('hybrid', 'knn'), 49.9, 'Hybrid k-NN is 20 points above the random student'),
    (('pixels', 'knn'), 50.0, 'Hybrid k-NN is above raw pixels'),
    (('hybrid', 'nmi'), [.9, .06, .05, .9], 'Hybrid NMI at the relation layers is 3 times'),
    (('hybrid', 'relation_kl'), 1.5, "Hybrid relations are nearer to the MAE's"),
    (('hybrid', 'losses', 'loss/feature'), [1.0, 0.71], 'loss/feature falls by 30 %'),
    (('hybrid', 'losses', 'loss/relation'), [0.1, 0.08], 'loss/relation falls by 30 %'),
    (('hybrid', 'losses'), {'loss/feature': [1.0, 0.5]}, 'loss/relation falls by 30 %'),
])
def test_verdicts__each_can_fail_alone(path, value, claim):
    failed = [name for name, holds in verdicts(changed(*path, value=value)).items() if not holds]
    assert len(failed) == 1 and failed[0].startswith(claim)


def test_verdicts_of_moma__all_hold_at_the_margin():
    # 45 = 30 + 15, .06 = .12 / 2 and .04 = 2 x .02 at layer 2.
    assert list(verdicts(MOMA, 'moma').values()) == [True] * 8


@pytest.mark.parametrize('path, value, claim', [
    (('moco-to-mae', 'knn'), 44.9, 'k-NN of the MAE taught'),
    (('moco-mae', 'knn'), 44.9, 'k-NN of the student of both'),
    (('moco-to-mae', 'nmi'), [.0, .0, .061, .0], 'attention of the MAE'),
    (('mae-to-moco', 'nmi'), [.9, .9, .039, .9], 'attention of the MoCo v3'),
    (('mae-to-moco', 'losses', 'loss/mae'), [0.8, 0.57], 'mae-to-moco: loss/mae falls'),
    (('moco-mae', 'losses', 'loss/moco'), [1.2, 0.85], 'moco-mae: loss/moco falls'),
])
def test_verdicts_of_moma__each_can_fail_alone(path, value, claim):
    results = changed(*path, value=value, results=MOMA)
    failed = [name for name, holds in verdicts(results, 'moma').items() if not holds]
    assert len(failed) == 1 and failed[0].startswith(claim)


def test_format_table__numbers_in_their_columns():
    table = table_of(RESULTS, 'hybrid')
    assert list(table['model'])[4:8] == ['NMI 0', 'NMI 1*', 'NMI 2*', 'NMI 3']
    hybrid = table['Hybrid Distill student']
    assert (hybrid['k-NN %'], hybrid['over start'], hybrid['of CLS'], hybrid['NMI 1*'], hybrid['relation KL to MAE']
            ) == ('50.0', '+20.0', '42.0', '0.0600', '0.100')
    assert (hybrid['feature loss'], hybrid['relation loss']) == ('1.000 -> 0.500', '2.000 -> 0.200')
    assert table['raw pixels']['NMI 0'] == table['raw pixels']['relation loss'] == '-'
    assert table["student of teacher 1's features"]['relation loss'] == '-'


def test_format_table_of_moma__every_student_against_the_weights_it_started_from():
    table = table_of(MOMA, 'moma')
    gains = {label: row['over start'] for label, row in table.items() if label not in ('model', '---')}
    assert {label: gain for label, gain in gains.items() if gain != '-'} == {
        'MAE taught by MoCo v3': '+5.0', 'MoCo v3 taught by MAE': '-2.0', 'student of both': '+15.0'}
    assert (table['MoCo v3 taught by MAE']['moco loss'], table['MoCo v3 taught by MAE']['mae loss']) == (
        '-', '0.800 -> 0.400')
    assert (table['student of both']['moco loss'], table['student of both']['mae loss']) == (
        '1.200 -> 0.600', '0.900 -> 0.300')


def test_loss_curves__of_the_newest_run(tmp_path):
    for run, value in (('20260101_000000', 9.0), ('20260102_000000', 0.5)):
        path = tmp_path / run / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        entries = [{'lr': 0.1, 'loss': 1.0, 'loss/feature': value, 'step': 20}, {'loss/feature': value / 2, 'step': 40},
                   {'knn/top1': 3.0, 'step': 1}]
        path.write_text('\n'.join(json.dumps(entry) for entry in entries) + '\n')
    assert loss_curves(tmp_path) == {'loss/feature': [(20, 0.5), (40, 0.25)]}


def test_loss_curves__of_a_run_that_was_resumed(tmp_path):
    # The second start goes on from iteration 30, a checkpoint; the first had come to 50.
    for run, steps in (('20260101_000000', (20, 40)), ('20260102_000000', (40, 60))):
        path = tmp_path / run / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(json.dumps({'loss/feature': float(run[7]) + step, 'step': step}) for step in steps))
    assert loss_curves(tmp_path) == {'loss/feature': [(20, 21.0), (40, 42.0), (60, 62.0)]}


def test_kept_tokens__counts_and_nesting():
    model = build_distiller()
    images, kept = kept_tokens(model, torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)))
    assert images.shape == (3, 32, 32)
    # 16 patches at keep rate 0.8 in three stages: 13, 10, 8.
    assert [stage.flatten(1).sum(1).tolist() for stage in kept] == [[13] * 3, [10] * 3, [8] * 3]
    for earlier, later in zip(kept, kept[1:]):
        assert not (later & ~earlier).any()


def test_kept_tokens__of_a_random_masker_without_a_teacher():
    model = build_distiller(masker=dict(type='mmhdistill.ProgressiveTokenMasker', place='input', num_stages=1,
                                        keep_rate=0.25, scorer=dict(type='mmhdistill.RandomScorer')))
    _, kept = kept_tokens(model, torch.zeros(3, 3, 32, 32))
    assert [stage.flatten(1).sum(1).tolist() for stage in kept] == [[4] * 3]


def test_draw__of_moma(tmp_path):
    curves = {name: {loss: list(zip((20, 40), values)) for loss, values in MOMA[name]['losses'].items()}
              for name in STUDIES['moma'].students}
    draw(tmp_path / 'figure.png', STUDIES['moma'], MOMA, curves, torch.full((2, 8, 8), 100),
         [torch.ones(2, 2, 2, dtype=torch.bool)])
    pixels = plt.imread(tmp_path / 'figure.png')[..., :3]
    for model in {**STUDIES['moma'].teachers, **STUDIES['moma'].students}.values():
        colour = np.array([int(model.colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels - colour).max(axis=-1) < 0.01).sum() > 100, model.label


def test_draw__writes_a_picture_with_the_dropped_patches_in_orange(tmp_path):
    images = torch.full((2, 8, 8), 100)
    kept = [torch.ones(2, 2, 2, dtype=torch.bool) for _ in range(2)]
    curves = {'cl-only': {'loss/feature': [(20, 1.0), (40, 0.5)]},
              'hybrid': {'loss/feature': [(20, 1.0), (40, 0.5)], 'loss/relation': [(20, 2.0), (40, 0.1)]}}

    def orange():
        draw(tmp_path / 'figure.png', STUDIES['hybrid'], RESULTS, curves, images, kept)
        pixels = plt.imread(tmp_path / 'figure.png')[..., :3]
        assert pixels.shape[0] > 400 and pixels.shape[1] > 1200
        return int((np.abs(pixels - np.array([0.9, 0.62, 0.0])).max(axis=-1) < 0.01).sum())

    none = orange()
    for stage in kept:
        stage[:, 0, 0] = False
    some = orange()
    kept[1][:, 1] = False
    more = orange()
    # 4 patches, then 8: the lines in a like colour stay.
    assert none < some < more
    assert more - none == pytest.approx(2 * (some - none), rel=0.05)
