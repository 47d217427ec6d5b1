"""Figures of :mod:`mmhdistill.analysis.compare`, drawn at the size of print.

At most as wide as the text of a paper, and as one of its columns where that suffices; text is of 7.5 pt. Lines and
panels of more models go on below. Colours are told apart by all.
"""
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

# Inches.
_COLUMN, _TEXT = 3.3, 6.75
_CELL = 0.85
# Pictures in a line, besides the image.
_PICTURES = 6
# Okabe and Ito's, without yellow.
_COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
_MARKERS = 'osD^vPX'
_STYLE = {'font.size': 7.5, 'axes.titlesize': 'medium', 'figure.titlesize': 'medium', 'axes.spines.top': False,
          'axes.spines.right': False, 'legend.frameon': False}
_FRAMED = {**_STYLE, 'axes.spines.top': True, 'axes.spines.right': True}
_BARE = {**_STYLE, 'axes.spines.left': False, 'axes.spines.bottom': False}


def diversity(report: dict):
    panels = {'nmi': 'NMI of queries and keys', 'distance': 'attention distance\n(image sides)',
              'rank': 'effective rank'}
    with plt.rc_context(_STYLE):
        longest = max(len(name) for name in report)
        columns = min(max(90 // (longest + 8), 1), len(report), 4)
        figure, axes = plt.subplots(1, 3, figsize=(_TEXT, 2.1 + 0.15 * -(-len(report) // columns)),
                                    layout='constrained')
        figure.get_layout_engine().set(wspace=0.04)
        for ax, (key, label) in zip(axes, panels.items()):
            for index, (name, found) in enumerate(report.items()):
                unit = found['image_size'] if key == 'distance' else 1
                values = [np.atleast_1d(value) / unit for value in found[key]]
                colour, layers = _COLOURS[index % 7], range(len(values))
                # A colour comes back with another marker.
                ax.plot(layers, [value.mean() for value in values], color=colour, linewidth=1.2,
                        marker=_MARKERS[(index + index // 7) % 7], markersize=3, label=_text(name, 90))
                if len(values[0]) > 1:
                    ax.fill_between(layers, [value.min() for value in values], [value.max() for value in values],
                                    color=colour, alpha=0.13, linewidth=0)
            ax.set_xlabel('layer')
            ax.set_ylabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.25)
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=columns)
    return figure


def cka(matrices: dict[tuple[str, str], Tensor]):
    with plt.rc_context(_FRAMED):
        figure, axes = _panels(len(matrices))
        for ax, ((a, b), matrix) in zip(axes, matrices.items()):
            picture = ax.imshow(matrix, vmin=0, vmax=1, cmap='cividis', origin='lower', aspect='auto')
            ax.set_box_aspect(1)
            ax.set_xlabel(_text(b, 16))
            ax.set_ylabel(_text(a, 16))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True))
        figure.colorbar(picture, ax=figure.axes, label='linear CKA of layers', shrink=0.8,
                        aspect=20 * axes[0].get_gridspec().nrows)
    return figure


def fourier(report: dict):
    with plt.rc_context(_STYLE):
        figure, axes = _panels(len(report), height=1.8, sharey=True)
        depth = max(len(found['fourier']) for found in report.values())
        scale = plt.cm.ScalarMappable(plt.Normalize(0, max(depth - 1, 1)), 'viridis')
        for ax, (name, found) in zip(axes, report.items()):
            # An odd side has no frequency π.
            side = found['image_size'] // found['patch_size']
            for layer, curve in enumerate(found['fourier']):
                ax.plot(2 / side * np.arange(len(curve)), curve, color=scale.to_rgba(layer), linewidth=1.2)
            ax.set_title(_text(name, 25))
            ax.set_xlabel('frequency (π)')
            ax.grid(alpha=0.25)
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel('Δ log amplitude')
        figure.colorbar(scale, ax=figure.axes, label='layer', ticks=sorted({0, (depth - 1) // 2, depth - 1}))
    return figure


def attention(images: Tensor, maps: dict[str, list[list[Tensor]]], queries: list[tuple[float, float]],
              layers: list[float]):
    """Colours of an image and a model are of one scale, in multiples of what each patch gets if all get alike.

    Args:
        maps: model -> image -> one map for each layer and query, layer by layer.
    """
    shown = [(share, query) for share in layers for query in queries]
    with plt.rc_context(_BARE):
        figure, rows = _strips(
            list(maps) * len(images), ['last layer' if share == 1 else f'layer at {share:.0%}' for share, _ in shown],
            beside=0.85, whole=len(queries))
        for row, (ax, cells) in enumerate(rows):
            image, index = divmod(row, len(maps))
            strip = [values * values.numel() for values in list(maps.values())[index][image]]
            ax.imshow(images[image].permute(1, 2, 0).byte(), extent=(0, 1, 1, 0))
            for y, x in queries:
                _mark(ax, x, y)
            for cell, values, (_, (y, x)) in zip(cells, strip, shown):
                picture = cell.imshow(values, cmap='cividis', extent=(0, 1, 1, 0), vmin=0,
                                      vmax=max(values.max().item() for values in strip))
                _mark(cell, x, y)
            figure.colorbar(picture, ax=cells, label='attention\n(1: uniform)', ticks=MaxNLocator(4), aspect=12,
                            fraction=0.05, pad=0.01)
    return figure


def kept(name: str, images: Tensor, how: str, rates: dict[float, str], strips: list[list[Tensor]]):
    labels = [f'{when}\nkeep rate {rate:.2f}' for rate, when in rates.items()]
    with plt.rc_context(_BARE):
        figure, rows = _strips(labels * len(images), [f'stage {stage + 1}' for stage in range(len(strips[0]))],
                               beside=0.4)
        for row, (ax, cells) in enumerate(rows):
            image, time = divmod(row, len(rates))
            picture = images[image].permute(1, 2, 0).numpy() / 255
            ax.imshow(picture)
            for cell, masks in zip(cells, strips[time]):
                # The patch of each pixel, also where patches are no whole number of them.
                rows, columns = ((2 * np.arange(length) + 1) * side // (2 * length) for length, side in zip(
                    picture.shape, masks.shape[1:]))
                mask = masks[image].numpy()[rows][:, columns, None]
                cell.imshow(picture * mask + (1 - mask) * 0.92)
        figure.suptitle(_text(f'{name}, {how}', int(15 * figure.get_figwidth())))
    return figure


def _panels(count: int, height: float | None = None, **options):
    """A figure of ``count`` panels, at most four in a line, and their axes; a single one is as wide as a column.

    Args:
        height: of a line, in inches; by default panels are square.
    """
    lines = -(-count // 4)
    columns = -(-count // lines)
    width = _COLUMN if count == 1 else _TEXT
    height = height or (width - 0.6) / columns
    figure, axes = plt.subplots(lines, columns, figsize=(width, lines * height), squeeze=False, layout='constrained',
                                **options)
    figure.get_layout_engine().set(wspace=0.04)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def _strips(labels: list[str], titles: list[str], beside: float, whole: int = 1):
    """A figure, and for each label the axes of an image and of a picture for each title.

    Args:
        beside: inches for labels and colour bars.
        whole: where they fit, so many pictures stay in one line.
    """
    columns = min(len(titles), _PICTURES, whole * max(_PICTURES // whole, 1))
    lines = -(-len(titles) // columns)
    width = min(max(beside + _CELL * (1 + columns), _COLUMN), _TEXT)
    titled = len(labels) * lines if lines > 1 else 1
    figure, axes = plt.subplots(len(labels) * lines, 1 + columns, squeeze=False, layout='constrained',
                                figsize=(width, 0.3 + _CELL * len(labels) * lines + 0.15 * titled))
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    rows = []
    for row, label in enumerate(labels):
        block = axes[row * lines:(row + 1) * lines]
        block[0, 0].set_ylabel(_text(label, 14))
        cells = list(block[:, 1:].flat)[:len(titles)]
        if row == 0 or lines > 1:
            for ax, title in zip(cells, titles):
                ax.set_title(title, pad=3)
        rows.append((block[0, 0], cells))
    return figure, rows


def _mark(ax, x: float, y: float) -> None:
    ax.plot(x, y, 'x', color='#D55E00', markersize=5, markeredgewidth=1.5, clip_on=False)


def _text(text: str, width: int) -> str:
    """``text`` in lines of ``width`` characters: a dollar would start a formula, an underscore at its start keep it out
    of legends."""
    lines = '\n'.join(textwrap.fill(line, width) for line in text.split('\n'))
    return (' ' if text.startswith('_') else '') + lines.replace('$', r'\$')


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=200)
    plt.close(figure)
