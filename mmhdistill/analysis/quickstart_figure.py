"""The quick start's figure: loss curves, NMI by layer, which tokens were kept."""
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

from .quickstart import loss_names  # noqa: E402
from .studies import Study  # noqa: E402


def draw(path: Path, study: Study, results: dict, curves: dict, images: Tensor, kept: list[Tensor]) -> None:
    """
    Args:
        results: of :func:`mmhdistill.analysis.quickstart.report`.
        curves: model -> loss -> (iteration, value).
        images, kept: of :func:`mmhdistill.analysis.quickstart.kept_tokens`.
    """
    with plt.rc_context({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False}):
        figure = plt.figure(figsize=(11, 3.9), layout='constrained')
        left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1, 1.05))
        _losses(left, study, curves)
        _nmi(middle, study, results)
        _tokens(right, images, kept)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _losses(figure, study: Study, curves: dict) -> None:
    names = loss_names(curves.values())
    axes = figure.subplots(len(names), 1, sharex=True)
    for ax, key in zip(axes, names):
        for name, losses in curves.items():
            if key in losses:
                steps, values = zip(*losses[key])
                model = study.students[name]
                ax.plot(steps, values, color=model.colour, label=model.label)
        ax.set_ylabel(key.removeprefix('loss/') + ' loss')
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel('iteration')
    figure.suptitle('Losses (means of 20 iterations)', fontsize=10)


def _nmi(figure, study: Study, results: dict) -> None:
    ax = figure.subplots()
    for name, model in {**study.teachers, **study.students}.items():
        values = results[name]['nmi']
        ax.plot(range(len(values)), values, color=model.colour, marker=model.marker,
                linestyle='solid' if name in study.students else (0, (4, 2)),
                label=f"{model.label} ({results[name]['knn']:.0f} % k-NN)")
    for layer in results['relation_layers']:
        ax.axvspan(layer - 0.15, layer + 0.15, color='black', alpha=0.07, linewidth=0)
    ax.set_xticks(range(len(values)))
    ax.set_xlabel('layer (shaded: of the relation KL)')
    ax.set_ylabel('NMI of queries and keys')
    ax.set_ylim(0, 1.5 * max(max(results[name]['nmi']) for name in (*study.teachers, *study.students)))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=7.5, loc='upper left', borderaxespad=0)
    figure.suptitle('Diversity of attention on unseen crops', fontsize=10)


def _tokens(figure, images: Tensor, kept: list[Tensor]) -> None:
    axes = figure.subplots(len(images), 1 + len(kept), squeeze=False)
    patch = images.shape[-1] // kept[0].shape[-1]
    titles = ['crop', *(f'stage {s + 1}: {int(stage[0].sum())}' for s, stage in enumerate(kept))]
    for row, image in enumerate(images.float().numpy()):
        for column, ax in enumerate(axes[row]):
            shown = np.stack([image / 255] * 3, axis=-1)
            if column:
                dropped = ~kept[column - 1][row].numpy().repeat(patch, 0).repeat(patch, 1)
                # Orange where dropped: told apart from any grey.
                shown[dropped] = np.array([0.9, 0.62, 0.0])
            ax.imshow(shown, interpolation='nearest', vmin=0, vmax=1)
            ax.set_axis_off()
            if row == 0:
                ax.set_title(titles[column], fontsize=8)
    figure.suptitle(f'Tokens kept of {kept[0][0].numel()} (orange: dropped)', fontsize=10)
