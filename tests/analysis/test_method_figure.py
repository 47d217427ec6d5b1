import matplotlib.pyplot as plt
import pytest
from mmengine.config import Config

from mmhdistill.analysis import method_figure
from tests.docs.test_readme import ROOT


@pytest.mark.parametrize('config', ['vit-b_clip-mae_300e', 'vit-l_clip-mae_300e'])
def test_draw__says_what_the_config_says(config, tmp_path, monkeypatch):
    cfg = Config.fromfile(ROOT / f'configs/hdistill/{config}.py')
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    method_figure.draw(cfg, tmp_path / 'method.png')
    said = [text.get_text() for text in figures[0].axes[0].texts]
    monkeypatch.undo()
    plt.close(figures[0])
    assert (tmp_path / 'method.png').stat().st_size > 10_000
    side = 224 // cfg.model.backbone.patch_size
    left = method_figure.kept_counts(side * side, cfg.model.masker.keep_rate, [1, 2, 3])
    assert sum(f'of {side * side} patches' in text for text in said) == 1
    assert sum(' → '.join(map(str, (side * side, *left))) in text for text in said) == 1
    for teacher in cfg.model.teachers.values():
        assert sum(teacher.card in text for text in said) == 1
