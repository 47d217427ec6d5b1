"""The method as a picture, drawn from a config: which teacher gives what to which loss, where tokens are dropped."""
from pathlib import Path

import matplotlib
from mmengine.config import Config

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

from ..models import find_card  # noqa: E402
from ..registry import MODELS  # noqa: E402

FEATURE, RELATION, STUDENT, PLAIN = '#F3C977', '#9CC9EA', '#9ED9C3', '#EEEEEE'


def draw(cfg: Config, path: str | Path) -> None:
    """Draw ``cfg.model``, a HybridDistiller with a feature and a relation loss and ``input`` masking."""
    model = cfg.model
    feature, relation, masker = model.losses.feature, model.losses.relation, model.masker
    cards = {name: find_card(teacher.card) for name, teacher in model.teachers.items()}
    side = model.backbone.img_size // model.backbone.patch_size
    counts = MODELS.build(masker).counts(side * side)
    kinds = relation.get('kinds', 'qk')
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    read = ', '.join(word for word in ('queries', 'keys', 'values') if word[0] in ''.join(kinds))
    scores = ', '.join(f'{kind.upper()}ᵀ/√d' for kind in kinds)
    scores = f'KL of softmax({scores})' if relation.get('distance', 'kl') == 'kl' else f'SmoothL1 of {scores}'
    at = 'given layers' if relation.get('layers') else 'later-but-not-last layers'
    distance = dict(smooth_l1='SmoothL1', cosine='cosine', mse='MSE')[feature.get('distance', 'smooth_l1')]
    whitened = 'whitened ' if feature.get('normalize_target', True) else ''
    with plt.rc_context({'font.size': 9.5, 'font.family': 'DejaVu Sans'}):
        figure, ax = plt.subplots(figsize=(10.5, 3.9), layout='constrained')
        ax.set_xlim(0, 105)
        ax.set_ylim(0, 39)
        ax.set_axis_off()
        _box(ax, (1, 15), (13, 9), f'image\n{model.backbone.img_size} px\n{side}×{side} patches', PLAIN)
        _box(ax, (25, 30), (30, 8), f'teacher {feature.teacher}, frozen\n{cards[feature.teacher].name}', FEATURE)
        _box(ax, (25, 15.5), (30, 8), f'student, trained\nplain ViT on {counts[-1]} of {side * side} patches', STUDENT)
        _box(ax, (25, 1), (30, 8), f'teacher {relation.teacher}, frozen\n{cards[relation.teacher].name}', RELATION)
        _box(ax, (71, 28), (33, 10), f'feature loss\n{distance}({whitened}final features,\nprojected student features)',
             FEATURE)
        _box(ax, (71, 1), (33, 10), f'token relation loss\n{scores} at\n{at}', RELATION)
        _arrow(ax, (14, 21), (25, 34))
        _arrow(ax, (14, 19.5), (25, 19.5))
        _arrow(ax, (14, 18), (25, 5))
        _arrow(ax, (55, 34), (71, 34), 'final features', (63, 35.4))
        _arrow(ax, (55, 21), (71, 30), 'final features', (58.5, 27.5))
        _arrow(ax, (55, 18), (71, 9), read, (58.5, 11.6))
        _arrow(ax, (55, 5), (71, 5), read, (63, 3.6))
        above = masker.teacher == feature.teacher
        _arrow(ax, (29, 30 if above else 9), (29, 23.5 if above else 15.5), dashed=True)
        ax.text(30.2, 26.7 if above else 12.2, 'redundant tokens are dropped\n' +
                ' → '.join(map(str, (side * side, *counts))), ha='left', va='center', fontsize=8.5)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _box(ax, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str) -> None:
    ax.add_patch(FancyBboxPatch(corner, *size, boxstyle='round,pad=0.1,rounding_size=1.2', facecolor=colour,
                                edgecolor='#444444', linewidth=0.9))
    ax.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha='center', va='center')


def _arrow(ax, start, end, text: str = '', at: tuple[float, float] = (0, 0), dashed: bool = False) -> None:
    ax.annotate('', end, start, arrowprops=dict(
        arrowstyle='-|>', color='#444444', linewidth=1.1, linestyle='--' if dashed else '-', shrinkA=1, shrinkB=1))
    ax.text(*at, text, ha='center', va='center', fontsize=8.5)
