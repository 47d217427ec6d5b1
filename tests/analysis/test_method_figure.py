import matplotlib.pyplot as plt
import pytest
from mmengine.config import Config

from mmhdistill.analysis import method_figure
from mmhdistill.functional import kept_counts
from tests.docs.test_readme import ROOT


def drawn(cfg, path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    method_figure.draw(cfg, path)
    said = [text.get_text() for text in figures[0].axes[0].texts]
    monkeypatch.undo()
    plt.close(figures[0])
    assert path.stat().st_size > 10_000
    return said


@pytest.mark.parametrize('config', ['vit-b_clip-mae_300e', 'vit-l_clip-mae_300e'])
def test_draw__says_what_the_config_says(config, tmp_path, monkeypatch):
    cfg = Config.fromfile(ROOT / f'configs/hdistill/{config}.py')
    said = drawn(cfg, tmp_path / 'method.png', monkeypatch)
    assert 'feature loss\nSmoothL1(whitened final features,\nprojected student features)' in said
    assert 'token relation loss\nKL of softmax(QKᵀ/√d) at\nlater-but-not-last layers' in said
    assert said.count('queries, keys') == 2
    side = 224 // cfg.model.backbone.patch_size
    left = kept_counts(side * side, cfg.model.masker.keep_rate, [1, 2, 3])
    assert sum(f'of {side * side} patches' in text for text in said) == 1
    assert sum(' → '.join(map(str, (side * side, *left))) in text for text in said) == 1
    for teacher in cfg.model.teachers.values():
        assert sum(teacher.card in text for text in said) == 1


def test_draw__of_other_losses_and_stages(tmp_path, monkeypatch):
    cfg = Config.fromfile(ROOT / 'configs/hdistill/vit-b_clip-mae_300e.py')
    cfg.model.losses.relation.update(kinds=['vv', 'qk'], distance='smooth_l1', layers=[(3, 3)])
    cfg.model.losses.feature.update(distance='cosine', normalize_target=False)
    cfg.model.masker.num_stages = 2
    said = drawn(cfg, tmp_path / 'method.png', monkeypatch)
    assert 'feature loss\ncosine(final features,\nprojected student features)' in said
    assert 'token relation loss\nSmoothL1 of VVᵀ/√d, QKᵀ/√d at\ngiven layers' in said
    assert said.count('queries, keys, values') == 2
    assert sum('196 → 137 → 96' in text and '67' not in text for text in said) == 1
