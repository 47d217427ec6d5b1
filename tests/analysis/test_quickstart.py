import copy
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mmhdistill.analysis.quickstart import format_table, kept_tokens, loss_curves, verdicts
from mmhdistill.analysis.quickstart_figure import draw
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


def changed(*path, value):
    results = copy.deepcopy(RESULTS)
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


def test_format_table__numbers_in_their_columns():
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in format_table(RESULTS).splitlines() if line.startswith('|')]
    table = {row[0]: dict(zip(rows[0], row)) for row in rows}
    assert len({len(row) for row in rows}) == 1
    assert rows[0][3:7] == ['NMI 0', 'NMI 1*', 'NMI 2*', 'NMI 3']
    hybrid = table['Hybrid Distill student']
    assert (hybrid['k-NN %'], hybrid['of CLS'], hybrid['NMI 1*'], hybrid['relation KL to MAE']) == (
        '50.0', '42.0', '0.0600', '0.100')
    assert (hybrid['feature loss'], hybrid['relation loss']) == ('1.000 -> 0.500', '2.000 -> 0.200')
    assert table['raw pixels']['NMI 0'] == table['raw pixels']['relation loss'] == '-'
    assert table["student of teacher 1's features"]['relation loss'] == '-'


def test_loss_curves__of_the_newest_run(tmp_path):
    for run, value in (('20260101_000000', 9.0), ('20260102_000000', 0.5)):
        path = tmp_path / run / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        entries = [{'lr': 0.1, 'loss': 1.0, 'loss/feature': value, 'step': 20}, {'loss/feature': value / 2, 'step': 40},
                   {'knn/top1': 3.0, 'step': 1}]
        path.write_text('\n'.join(json.dumps(entry) for entry in entries) + '\n')
    assert loss_curves(tmp_path) == {'loss/feature': [(20, 0.5), (40, 0.25)]}


def test_kept_tokens__counts_and_nesting():
    model = build_distiller()
    images, kept = kept_tokens(model, torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)))
    assert images.shape == (3, 32, 32)
    # 16 patches at keep rate 0.8 in three stages: 13, 10, 8.
    assert [stage.flatten(1).sum(1).tolist() for stage in kept] == [[13] * 3, [10] * 3, [8] * 3]
    for earlier, later in zip(kept, kept[1:]):
        assert not (later & ~earlier).any()


def test_draw__writes_a_picture_with_the_dropped_patches_in_orange(tmp_path):
    images = torch.full((2, 8, 8), 100)
    kept = [torch.ones(2, 2, 2, dtype=torch.bool) for _ in range(2)]
    curves = {'cl-only': {'loss/feature': [(20, 1.0), (40, 0.5)]},
              'hybrid': {'loss/feature': [(20, 1.0), (40, 0.5)], 'loss/relation': [(20, 2.0), (40, 0.1)]}}

    def orange():
        draw(tmp_path / 'figure.png', RESULTS, curves, images, kept)
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
