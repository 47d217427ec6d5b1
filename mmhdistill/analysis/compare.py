"""Models side by side: how diverse their attention is, how alike their features, what they look at."""
import base64
import functools
import html
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets import ImageFolder
from ..datasets.decode import BadImage, read_image
from ..datasets.listing import printable
from ..engine.hooks.own_seed import own_seed
from ..functional import attention_from_qk, fourier_log_amplitude, linear_cka_matrix, ramp
from ..models.taps import ViTOutput, merge_taps
from ..registry import MODELS
from .diversity import attention_by_layer, diversity_taps, rank_by_layer
from .zoo import Model

# Places, as shares of height and width, whose attention is drawn, and where: shares of the depth, 1 for the last layer.
QUERIES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))
LAYERS = (0.75, 1.0)
# Tokens that CKA compares at most, spread evenly: it needs some times the width.
_TOKENS = 4096
# Images whose attention is drawn, and that are run at a time.
_DRAWN = 2


def compare(models: list[Model], images: Tensor, out: Path, queries: Sequence[tuple[float, float]] = QUERIES,
            layers: Sequence[float] = LAYERS, notes: Sequence[str] = ()) -> dict:
    """Measure ``models`` and write ``report.json``, one PNG a figure and ``report.html``, which holds all, to ``out``.

    Returns:
        What ``report.json`` holds: ``models``, numbers of :func:`run` by name, ``cka`` of each pair of them, layer by
        layer, ``num_images``, and ``notes``, with what could not be drawn.

    Args:
        images: (M, 3, H, W) RGB in 0-255; each model sees them at the size that it was made for.
        queries: places, as shares of height and width, whose attention is drawn.
        layers: shares of the depth whose attention is drawn, 1 for the last.
        notes: to be told on the page, as those of :func:`read_images`.
    """
    from . import compare_figures as figures
    out.mkdir(parents=True, exist_ok=True)
    outputs, found = {}, {}
    for model in models:
        outputs[model.name], found[model.name] = run(model, images)
    cka, notes = cka_matrices(models, outputs), list(notes)
    drawn = {
        'diversity': figures.diversity(found),
        'cka': figures.cka(cka),
        'fourier': figures.fourier(found),
        'attention': figures.attention(images[:_DRAWN], {model.name: [[
            attention_map(model, outputs[model.name], image, query, share) for share in layers for query in queries]
            for image in range(len(images[:_DRAWN]))] for model in models}, queries, layers),
    }
    for model in models:
        if not (model.settings.get('model') or {}).get('masker'):
            continue
        try:
            strips = kept_tokens(models, model, images[:3])
        except ValueError as error:
            notes.append(f'What the masker of {model.name} leaves is not drawn: {error}')
        else:
            drawn[f'kept-{len(drawn)}'] = figures.kept(model.name, images[:3], *strips)
    report = dict(models=found, num_images=len(images), notes=notes,
                  cka={f'{a} / {b}': matrix.tolist() for (a, b), matrix in cka.items()})
    (out / 'report.json').write_text(json.dumps(report, indent=1) + '\n')
    for name, figure in drawn.items():
        figures.save(figure, out / f'{name}.png')
    (out / 'report.html').write_text(page(report, out, {
        name: figure.get_figwidth() for name, figure in drawn.items()}))
    return report


def read_images(folder: str | Path, number: int, size: int) -> tuple[Tensor, list[str]]:
    """``number`` images spread evenly over a folder, cut to their middle square of ``size`` pixels: (M, 3, s, s).

    The next image of the folder stands in for one that cannot be used.

    Returns:
        RGB in 0-255, fewer than ``number`` where the folder holds no more; and a note on those that were left out, if
        there are any.

    Raises:
        FileNotFoundError: there is no image.
        ValueError: none can be used.
    """
    dataset = ImageFolder(str(folder), pipeline=[])
    tried, squares, bad = set(), [], []
    for first in torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long().tolist():
        for index in ((first + step) % len(dataset) for step in range(len(dataset))):
            if index in tried:
                continue
            tried.add(index)
            path = dataset.get_data_info(index)['img_path']
            try:
                image, _ = read_image(path)
            except BadImage as error:
                bad.append(f'{printable(path)} ({error})')
                continue
            squares.append(_square(image, size))
            break
    if not squares:
        raise ValueError(f"no image of '{printable(str(folder))}' can be used, for example {bad[0]}.")
    count = '1 image that cannot be used was' if len(bad) == 1 else f'{len(bad)} images that cannot be used were'
    return torch.cat(squares), [f'{count} left out, for example {bad[0]}.'] if bad else []


def _square(image: np.ndarray, size: int) -> Tensor:
    """The middle of an image in BGR, (1, 3, size, size) in RGB."""
    rgb = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float()
    side = min(rgb.shape[-2:])
    top, left = ((length - side) // 2 for length in rgb.shape[-2:])
    return resized(rgb[None, :, top:top + side, left:left + side], size)


def resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode='bicubic', antialias=True).clamp(0, 255)


def run(model: Model, images: Tensor) -> tuple[ViTOutput, dict]:
    """What a model gives, and numbers of each layer.

    A few images are run at a time, since queries and keys of all layers of many would fill the memory.

    Returns:
        ``hidden`` of every layer and image, ``q`` and ``k`` of the first images alone; and of each layer ``nmi`` and
        ``distance`` of each head, ``rank``, and the ``fourier`` curve of its map.
    """
    outputs, statistics = [], []
    for part in resized(images, model.image_size).split(_DRAWN):
        output = model.run(part, diversity_taps(model.spec))
        attention = attention_by_layer(output, model.spec)
        statistics.append({name: len(part) / len(images) * torch.stack(values) for name, values in attention.items()})
        outputs.append(output if not outputs else replace(
            output, taps={key: x for key, x in output.taps.items() if key[1] == 'hidden'}))
    taps = {key: torch.cat([output.taps[key] for output in outputs]) if key[1] == 'hidden' else x
            for key, x in outputs[0].taps.items()}
    output = replace(outputs[0], taps=taps)
    maps = [output.patches(layer, 'hidden').transpose(1, 2).unflatten(2, output.grid)
            for layer in range(model.spec.depth)]
    return output, dict(
        {name: sum(part[name] for part in statistics).tolist() for name in attention},
        rank=[value.item() for value in rank_by_layer(output, model.spec)],
        fourier=[fourier_log_amplitude(x).tolist() for x in maps], image_size=model.image_size,
        patch_size=model.spec.patch_size, heads=model.spec.num_heads)


def cka_matrices(models: list[Model], outputs: dict[str, ViTOutput]) -> dict[tuple[str, str], Tensor]:
    """Pair of models -> CKA of each layer of the first with each of the second; every model with itself too.

    Tokens of the finer grid are resampled to the coarser one, bilinearly.
    """
    @functools.cache
    def features(name: str, grid: tuple[int, int]) -> list[Tensor]:
        output = outputs[name]
        count = len(output.taps[0, 'hidden']) * grid[0] * grid[1]
        taken = torch.linspace(0, count - 1, min(count, _TOKENS)).long()
        return [output.patches(layer, 'hidden', grid=None if output.grid == grid else grid).flatten(0, 1)[taken]
                for layer in range(depths[name])]

    depths = {model.name: model.spec.depth for model in models}
    pairs = [(a, b) for index, a in enumerate(depths) for b in list(depths)[index:]]
    grids = {pair: min((outputs[name].grid for name in pair), key=math.prod) for pair in pairs}
    return {(a, b): linear_cka_matrix(features(a, grid), features(b, grid)) for (a, b), grid in grids.items()}


def attention_map(model: Model, output: ViTOutput, image: int, query: tuple[float, float], share: float) -> Tensor:
    """Where the patch at ``query`` of an image looks in one layer, mean over heads: (rows, columns)."""
    layer = max(round(share * model.spec.depth), 1) - 1
    q, k = (output.taps[layer, kind][image:image + 1] for kind in 'qk')
    attention = attention_from_qk(q, k, model.spec.num_heads, output.num_extra_tokens)[0].mean(dim=0)
    row, column = (min(int(place * side), side - 1) for place, side in zip(query, output.grid))
    return attention[row * output.grid[1] + column].unflatten(0, output.grid)


def kept_tokens(models: list[Model], owner: Model,
                images: Tensor) -> tuple[str, dict[float, str], list[list[Tensor]]]:
    """What the masker of ``owner``'s config leaves of each image after each stage, at five times of training.

    Scored by ``owner`` itself where tokens are dropped inside of it, and else by the model that has the name of the
    scoring teacher, or of its card, at the grid of ``owner``.

    Returns:
        What scored, :func:`keep_rates`, and for each of them, per stage, (M, rows, columns) bool.

    Raises:
        ValueError: the scoring teacher is not among ``models``.
    """
    masker = MODELS.build(owner.settings['model']['masker'])
    scorer = _scoring_model(models, owner, masker.teacher) if masker.teacher else owner
    masker.bind(scorer.spec)
    side = owner.image_size // owner.spec.patch_size
    images = resized(images, side * scorer.spec.patch_size)
    rates = keep_rates(owner.settings, masker.keep_rate)
    reference = scorer.run(images, masker.taps) if masker.place == 'input' and masker.taps else None
    everything = torch.arange(side * side).expand(len(images), -1)
    strips = []
    for rate in rates:
        masker.keep_rate = rate
        if masker.place == 'input':
            kept = _kept_of_input(masker, everything, reference)
        else:
            kept = _kept_inside(masker, scorer, images)
        strips.append([_mask(everything if ids is None else ids, everything, (side, side)) for ids in kept])
    return (f'scored by {scorer.name}' if masker.scorer.kinds else 'drawn at random'), rates, strips


def keep_rates(settings: dict, keep_rate: float) -> dict[float, str]:
    """Keep rates at the begin, three quarters and the end of training -> when each of them is first reached.

    Of the ramp's own begin, quarters and end where the config does not tell how long training is, or tells it in
    another unit than the ramp.
    """
    hook = next((hook for hook in settings.get('custom_hooks') or []
                 if str(hook.get('type')).endswith('RedundantTokenMasker')), {})
    training = settings.get('train_cfg') or {}
    unit = 'iteration' if 'max_iters' in training else 'epoch'
    last = training.get('max_iters', training.get('max_epochs'))
    begin, end = hook.get('begin', 0), hook.get('end')
    placed = last is not None and ((unit == 'epoch') == hook.get('by_epoch', True) or (begin, end) == (0, None))
    if not placed:
        begin, end, last = 0, 1, 1
    end = last if end is None else end
    rates = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        progress = (share * last - begin) / max(end - begin, 1e-6)
        rate = ramp(progress, hook.get('start', 1.0), hook.get('keep_rate') or keep_rate,
                    hook.get('schedule', 'constant'))
        rates.setdefault(rate, f'{unit} {share * last:g}' if placed else f'{share:.0%} of the ramp')
    return rates if len(rates) > 1 else dict.fromkeys(rates, 'throughout')


def _scoring_model(models: list[Model], owner: Model, teacher: str) -> Model:
    card = owner.settings['model'].get('teachers', {}).get(teacher, {}).get('card')
    names = {teacher, card['name'] if isinstance(card, dict) else card}
    for model in models:
        if model.name in names:
            return model
    raise ValueError(f"its tokens are scored by teacher '{teacher}', which is none of the models "
                     f'{[model.name for model in models]}: add it, as {teacher}:MODEL.')


def _kept_of_input(masker, everything: Tensor, reference: ViTOutput | None) -> list[Tensor]:
    """Patches left after each stage, (M, K)."""
    counts = masker.counts(everything.shape[1])
    kept = []
    for stage in range(len(counts)):
        with own_seed():  # A random scorer draws the same for the stages before.
            kept.append(masker.select(everything, counts[:stage + 1], reference))
    return kept


def _kept_inside(masker, model: Model, images: Tensor) -> list[Tensor | None]:
    """Patches that each stage of ``model`` sees, (M, K), or None for all."""
    depth = model.spec.depth
    with own_seed():
        reduce = masker.reducer(len(images), (images.shape[-1] // model.spec.patch_size)**2, images.device, None)
        output = model.run(images, merge_taps([masker.taps, {depth - 1: frozenset({'hidden'})}]), reduce)
    return [output.keep_ids[stage * depth // masker.num_stages] for stage in range(masker.num_stages)]


def _mask(keep_ids: Tensor, everything: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.zeros(everything.shape, dtype=torch.bool).scatter(1, keep_ids, True).unflatten(1, grid)


_TITLES = {
    'diversity': 'Attention and tokens by layer. Lines are means over heads, bands reach from the least head to the '
                 'greatest. NMI near 0: every query attends alike. Each model sees images of its own size, so '
                 'distances are drawn in sides of its image.',
    'cka': 'Linear CKA of the layers of each pair of models: 1 where one is a rotation of the other. Few tokens make '
           'it large: features of width d that share nothing have about d / (d + n) at n tokens, here the patches of '
           f'all images, on the coarser grid of the two, and at most {_TOKENS}.',
    'fourier': 'Log amplitude of feature maps along the diagonal, relative to frequency 0, by layer.',
    'attention': 'Where the marked patches look, mean over heads: attention to each patch, in multiples of what it '
                 'would get if all got alike. One scale for each image and model, that of the bar beside them.',
    'kept': 'Patches that the masker leaves, by stage and, where its schedule ramps, by time of training.',
}


def page(report: dict, out: Path, drawn: dict[str, float]) -> str:
    """Self-contained: pictures lie in the text, and text has one size in all of them.

    Args:
        drawn: figure -> width in inches.
    """
    rows = ''.join(
        f'<tr><td>{html.escape(name)}, {found["image_size"]} px</td><td>{layer}</td>' + ''.join(
            f'<td>{value:.4f}</td>' for value in (
                _mean(found['nmi'][layer]), _mean(found['distance'][layer]), found['rank'][layer]))
        + '</tr>' for name, found in report['models'].items() for layer in range(len(found['nmi'])))
    notes = ''.join(f'<p>{html.escape(note)}</p>' for note in report['notes'])
    pictures = ''.join(
        f'<h2>{html.escape(_TITLES[name.split("-")[0]])}</h2><img alt="{name}" '
        f'width="{150 * width:.0f}" src="data:image/png;base64,'
        f'{base64.b64encode((out / f"{name}.png").read_bytes()).decode()}">' for name, width in drawn.items())
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>mmhdistill: models compared</title><style>'
            'body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}'
            'img{max-width:100%}h2{font-size:1rem;font-weight:600;margin-top:2.5em}table{border-collapse:collapse}'
            'td,th{padding:.2em .9em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child'
            '{text-align:left}</style><h1>Models compared</h1>'
            f'<p>{html.escape(", ".join(report["models"]))}; {report["num_images"]} images</p>'
            f'{pictures}{notes}<h2>Numbers</h2><table><tr><th>model</th><th>layer</th><th>NMI</th>'
            f'<th>distance, px</th><th>effective rank</th></tr>{rows}</table></html>\n')


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
