"""Figures of :mod:`mmhdistill.analysis.compare`: for a paper's column, in colours that all can tell apart."""
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

# Okabe and Ito's, without yellow.
_COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
_MARKERS = 'osD^vPX'
_STYLE = {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False}


def diversity(report: dict):
    panels = {'nmi': 'NMI of queries and keys', 'distance': 'attention distance (px)', 'rank': 'effective rank'}
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout='constrained')
        for ax, (key, label) in zip(axes, panels.items()):
            for index, (name, found) in enumerate(report.items()):
                values = [np.atleast_1d(value) for value in found[key]]
                colour, layers = _COLOURS[index % len(_COLOURS)], range(len(values))
                ax.plot(layers, [value.mean() for value in values], color=colour, marker=_MARKERS[index % 7],
                        markersize=4, label=_text(name))
                if len(values[0]) > 1:
                    ax.fill_between(layers, [value.min() for value in values], [value.max() for value in values],
                                    color=colour, alpha=0.13, linewidth=0)
            ax.set_xlabel('layer')
            ax.set_ylabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.25)
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=min(len(report), 4))
    return figure


def cka(matrices: dict[tuple[str, str], Tensor]):
    names = list(dict.fromkeys(name for pair in matrices for name in pair))
    count = len(names)
    with plt.rc_context({**_STYLE, 'axes.spines.top': True, 'axes.spines.right': True}):
        figure, axes = plt.subplots(count, count, figsize=(1.2 + 2.1 * count, 0.8 + 2.1 * count), squeeze=False,
                                    layout='constrained')
        for (row, a), (column, b) in ((x, y) for x in enumerate(names) for y in enumerate(names)):
            ax = axes[row][column]
            if (a, b) not in matrices:
                ax.axis('off')
                continue
            picture = ax.imshow(matrices[a, b], vmin=0, vmax=1, cmap='cividis', origin='lower')
            ax.set_xlabel(f'layer of {_text(b)}')
            ax.set_ylabel(f'layer of {_text(a)}')
        figure.colorbar(picture, ax=axes, label='linear CKA', shrink=0.8)
    return figure


def fourier(report: dict):
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(report), figsize=(1 + 2.6 * len(report), 3), sharey=True, squeeze=False,
                                    layout='constrained')
        depth = max(len(found['fourier']) for found in report.values())
        scale = plt.cm.ScalarMappable(plt.Normalize(0, max(depth - 1, 1)), 'viridis')
        for ax, (name, found) in zip(axes[0], report.items()):
            for layer, curve in enumerate(found['fourier']):
                ax.plot(np.linspace(0, 1, len(curve)), curve, color=scale.to_rgba(layer))
            ax.set_title(_text(name), fontsize=9)
            ax.set_xlabel('frequency ($\\pi$)')
            ax.grid(alpha=0.25)
        axes[0][0].set_ylabel('$\\Delta$ log amplitude')
        figure.colorbar(scale, ax=axes, label='layer', ticks=sorted({0, (depth - 1) // 2, depth - 1}))
    return figure


def attention(images: Tensor, maps: dict[str, list[list[Tensor]]], queries: list[tuple[float, float]],
              layers: list[float]):
    """
    Args:
        maps: model -> image -> one map for each layer and query, layer by layer.
    """
    columns, rows = 1 + len(layers) * len(queries), len(images) * len(maps)
    with plt.rc_context({**_STYLE, 'axes.spines.left': False, 'axes.spines.bottom': False}):
        figure, axes = plt.subplots(rows, columns, figsize=(1.35 * columns, 1.35 * rows + 0.5), squeeze=False,
                                    layout='constrained')
        for ax in axes.flat:
            ax.set_xticks([])
            ax.set_yticks([])
        for row in range(rows):
            image, name = divmod(row, len(maps))
            name = list(maps)[name]
            axes[row][0].imshow(images[image].permute(1, 2, 0).byte(), extent=(0, 1, 1, 0))
            axes[row][0].set_ylabel(_text(name), fontsize=8)
            for y, x in queries:
                axes[row][0].plot(x, y, 'x', color='#D55E00', markersize=5)
            for column, values in enumerate(maps[name][image]):
                share, (y, x) = layers[column // len(queries)], queries[column % len(queries)]
                ax = axes[row][1 + column]
                ax.imshow(values, cmap='cividis', extent=(0, 1, 1, 0), vmin=0)
                ax.plot(x, y, 'x', color='#D55E00', markersize=6, markeredgewidth=2)
                if row == 0:
                    ax.set_title('last layer' if share == 1 else f'layer at {share:.0%}', fontsize=8)
    return figure


def kept(name: str, images: Tensor, how: str, rates: dict[float, str], strips: list[list[Tensor]]):
    stages = len(strips[0])
    rows = len(images) * len(rates)
    with plt.rc_context({**_STYLE, 'axes.spines.left': False, 'axes.spines.bottom': False}):
        figure, axes = plt.subplots(rows, 1 + stages, figsize=(1.4 * (1 + stages), 1.4 * rows + 0.6), squeeze=False,
                                    layout='constrained')
        for ax in axes.flat:
            ax.set_xticks([])
            ax.set_yticks([])
        for row in range(rows):
            image, time = divmod(row, len(rates))
            picture = images[image].permute(1, 2, 0).numpy() / 255
            axes[row][0].imshow(picture)
            rate, when = list(rates.items())[time]
            axes[row][0].set_ylabel(f'{when}\nkeep rate {rate:.2f}', fontsize=8)
            for stage, masks in enumerate(strips[time]):
                mask = np.kron(masks[image].numpy(), np.ones([length // side for length, side in zip(
                    picture.shape, masks.shape[1:])]))[:, :, None]
                axes[row][1 + stage].imshow(picture[:mask.shape[0], :mask.shape[1]] * mask + (1 - mask) * 0.92)
                if row == 0:
                    axes[row][1 + stage].set_title(f'stage {stage + 1}', fontsize=9)
        figure.suptitle(f'{_text(name)}, {_text(how)}', fontsize=9)
    return figure


def _text(name: str) -> str:
    """``name`` as it is: a dollar would start a formula, and an underscore at its start keep it out of legends."""
    return (' ' if name.startswith('_') else '') + name.replace('$', r'\$')


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=160)
    plt.close(figure)
