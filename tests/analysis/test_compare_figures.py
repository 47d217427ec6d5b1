import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from mmhdistill.analysis import compare_figures


def test_diversity__legend_has_every_name():
    found = dict(nmi=[[0.1, 0.2]], distance=[[3.0, 4.0]], rank=[5.0], image_size=32)
    figure = compare_figures.diversity({'_private': found, 'a $ b $': found})
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ['_private', r'a \$ b \$']


def test_diversity__means_and_bands_of_heads_and_sides_of_images():
    found = dict(nmi=[[0.1, 0.2, 0.6], [0.4, 0.5, 0.9]], distance=[[8.0, 16.0, 24.0], [4.0, 4.0, 16.0]],
                 rank=[5.0, 7.0])
    axes = compare_figures.diversity({'small': dict(found, image_size=32), 'large': dict(found, image_size=64)}).axes
    for model, side in enumerate((32, 64)):
        for ax, means, least, greatest in zip(
                axes, ([0.3, 0.6], [16 / side, 8 / side], [5, 7]), ([0.1, 0.4], [8 / side, 4 / side]),
                ([0.6, 0.9], [24 / side, 16 / side])):
            assert ax.lines[model].get_xdata().tolist() == [0, 1]
            assert ax.lines[model].get_ydata().tolist() == pytest.approx(means)
            vertices = {(x, round(y, 9)) for x, y in ax.collections[model].get_paths()[0].vertices.tolist()}
            assert vertices == {(x, round(y, 9)) for ends in (least, greatest) for x, y in enumerate(ends)}
        assert axes[2].lines[model].get_ydata().tolist() == [5, 7]
    assert not axes[2].collections and 'image sides' in axes[1].get_ylabel()


def test_fourier__frequencies_of_even_and_odd_grids():
    figure = compare_figures.fourier({
        'even': dict(fourier=[[0.0, -1.0, -2.0]], image_size=8, patch_size=2),
        'odd': dict(fourier=[[0.0, -3.0, -4.0]], image_size=20, patch_size=4)})
    even, odd = (ax.lines[0] for ax in figure.axes[:2])
    assert (even.get_xdata().tolist(), even.get_ydata().tolist()) == ([0, 0.5, 1], [0, -1, -2])
    assert (odd.get_xdata().tolist(), odd.get_ydata().tolist()) == (pytest.approx([0, 0.4, 0.8]), [0, -3, -4])


@pytest.mark.parametrize('side', [8, 7])
def test_kept__patches_that_are_left_are_seen(side):
    """Also where three patches are no whole number of pixels."""
    images = torch.arange(2 * 3 * side**2).view(2, 3, side, side) % 200
    masks = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    figure = compare_figures.kept('a', images, 'drawn at random', {0.5: 'throughout'}, [[masks, ~masks]])
    shown = [ax.images[0].get_array() for ax in figure.axes]
    for index, image in enumerate(images):
        picture = image.permute(1, 2, 0).numpy() / 255
        whole, *stages = shown[3 * index:3 * index + 3]
        assert (whole == picture).all()
        for mask, found in zip((masks[index], ~masks[index]), stages):
            for y, x in ((y, x) for y in range(side) for x in range(side)):
                left = mask[int((y + 0.5) * 3 / side), int((x + 0.5) * 3 / side)]
                assert found[y, x].tolist() == pytest.approx(picture[y, x].tolist() if left else [0.92] * 3)


def test_fourier__colour_is_that_of_the_layer():
    sizes = dict(image_size=2, patch_size=1)
    figure = compare_figures.fourier({'deep': dict(fourier=[[0.0, -1.0]] * 4, **sizes),
                                      'flat': dict(fourier=[[0.0, -1.0]] * 2, **sizes)})
    deep, flat, bar = figure.axes
    assert [line.get_color() for line in flat.lines] == [line.get_color() for line in deep.lines[:2]]
    assert bar.get_ylim() == (0, 3)


def drawn(models, queries, layers, stages, rates):
    """Every figure, of random numbers and names from short to long."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    names = ['openclip-vit-b-p16-laion400m', 'mae', '_odd $_{', 'run/epoch_300', 'a name of its own'][:models]
    found = {name: dict(nmi=rand(12, 12).tolist(), distance=rand(12, 12).tolist(), rank=rand(12).tolist(),
                        fourier=rand(12, 8).tolist(), image_size=224, patch_size=16) for name in names}
    maps = {name: [[rand(4, 4) for _ in range(len(queries) * len(layers))] for _ in range(2)] for name in names}
    images = 255 * rand(3, 3, 32, 32)
    return {
        'diversity': compare_figures.diversity(found),
        'cka': compare_figures.cka({(a, b): rand(12, 24) for i, a in enumerate(names) for b in names[i:]}),
        'fourier': compare_figures.fourier(found),
        'attention': compare_figures.attention(images[:2], maps, queries, layers),
        'kept': compare_figures.kept(names[0], images, f'scored by {names[1]}', {
            1 - index / 10: f'epoch {index}' for index in range(rates)}, [
                [rand(3, 4, 4) > 0.5 for _ in range(stages)] for _ in range(rates)])}


@pytest.mark.parametrize('models, queries, layers, stages, rates, widths', [
    (2, [(0.5, 0.5), (0.2, 0.2), (0.8, 0.8)], [0.75, 1.0], 3, 1, dict(attention=6.75, kept=3.8)),
    (5, [(0.1 * index, 0.5) for index in range(8)], [0.5, 1.0], 8, 3, dict(attention=6.75, kept=6.35)),
    (2, [(0.5, 0.5)], [1.0], 1, 1, dict(attention=3.3, kept=3.3)),
])
def test_figures__fit_a_paper(models, queries, layers, stages, rates, widths, tmp_path):
    for name, figure in drawn(models, queries, layers, stages, rates).items():
        compare_figures.save(figure, tmp_path / f'{name}.png')
        width = widths.get(name, 6.75)
        assert figure.get_figwidth() == pytest.approx(width)
        assert Image.open(tmp_path / f'{name}.png').width == pytest.approx(200 * width, abs=1)
        sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_visible() and text.get_text()}
        assert sizes == {7.5}, name
        # No panel is below two thirds of an inch.
        for ax in figure.axes:
            panel = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
            assert ax.get_label() == '<colorbar>' or not ax.axison or min(panel.width, panel.height) > 0.66, name


def test_figures__of_one_model_are_as_wide_as_a_column():
    found = dict(nmi=[[0.1, 0.2]], distance=[[3.0, 4.0]], rank=[5.0], fourier=[[0.0, -1.0]], image_size=2, patch_size=1)
    assert compare_figures.fourier({'one': found}).get_figwidth() == 3.3
    assert compare_figures.cka({('one', 'one'): torch.eye(1)}).get_figwidth() == 3.3


def test_cka__a_panel_for_each_pair():
    matrices = {(a, b): torch.arange(6).view(2, 3) / 100 + 0.1 * i + 0.07 * j
                for i, a in enumerate('abcde') for j, b in enumerate('abcde') if j >= i}
    *axes, bar = (ax for ax in compare_figures.cka(matrices).axes if ax.axison)
    assert [(ax.get_ylabel(), ax.get_xlabel()) for ax in axes] == list(matrices)
    for ax, matrix in zip(axes, matrices.values()):
        assert ax.images[0].get_array().tolist() == [pytest.approx(row) for row in matrix.tolist()]
    assert bar.get_ylim() == (0, 1)


def test_diversity__ten_models_are_told_apart():
    found = dict(nmi=[[0.1, 0.2]], distance=[[3.0, 4.0]], rank=[5.0], image_size=32)
    lines = compare_figures.diversity({str(index): found for index in range(10)}).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 10


def test_attention__marks_and_one_scale_for_an_image_and_a_model(images):
    """Model a: map i has its peak i + 1; model b: twice that; in the second image, ten times."""
    queries, layers = [(0.1, 0.9), (0.6, 0.3), (1.0, 0.0), (0.5, 0.5)], [0.25, 1.0]
    peaks = [torch.zeros(2, 2).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(index + 1.0))
             for index in range(8)]
    figure = compare_figures.attention(images[:2], {
        name: [[factor * scale * x for x in peaks] for scale in (1, 10)] for name, factor in (('a', 1), ('b', 2))},
        queries, layers)
    pictures = [ax for ax in figure.axes if ax.images and ax.get_label() != '<colorbar>']
    bars = [ax for ax in figure.axes if ax.get_label() == '<colorbar>']
    assert [ax.get_ylabel() for ax in pictures[::9]] == ['a', 'b', 'a', 'b']
    for row, factor in enumerate((1, 2, 10, 20)):
        image, *cells = pictures[9 * row:9 * row + 9]
        assert (image.images[0].get_array() == images[row // 2].byte().permute(1, 2, 0).numpy()).all()
        assert [(*line.get_ydata(), *line.get_xdata()) for line in image.lines] == queries
        # In multiples of a quarter, which is uniform.
        assert [cell.images[0].get_array().max() for cell in cells] == [4 * factor * (i + 1) for i in range(8)]
        assert {cell.images[0].get_clim() for cell in cells} == {(0, 32 * factor)}
        assert bars[row].get_ylim() == (0, 32 * factor)
        assert 'uniform' in bars[row].get_ylabel()
        assert [(*cell.lines[0].get_ydata(), *cell.lines[0].get_xdata()) for cell in cells] == 2 * queries
        # A layer stays in a line.
        assert [cell.get_title() for cell in cells] == 4 * ['layer at 25%'] + 4 * ['last layer']
        assert [cell.get_subplotspec().rowspan.start for cell in cells] == 4 * [2 * row] + 4 * [2 * row + 1]
