"""Models side by side: how diverse their attention is, how alike their features, what they look at."""
import base64
import html
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from mmcv import imread
from torch import Tensor

from ..datasets import ImageFolder
from ..functional import attention_from_qk, fourier_log_amplitude, linear_cka, ramp
from ..models.taps import ViTOutput
from ..registry import MODELS
from .diversity import diversity_taps, layer_statistics
from .zoo import Model

# Tokens that CKA compares at most, taken evenly: it needs some times the width.
_TOKENS = 4096


def compare(models: list[Model], images: Tensor, out: Path, queries: list[tuple[float, float]] | None = None,
            layers: list[float] | None = None) -> dict:
    """Measure ``models`` and write ``report.json``, one PNG a figure and ``report.html``, which holds all, to ``out``.

    Args:
        images: (M, 3, H, W) RGB in 0-255; each model sees them at the size that it was made for.
        queries: places, as shares of height and width, whose attention is drawn.
        layers: shares of the depth whose attention is drawn, 1 for the last.
    """
    from . import compare_figures as figures
    queries = queries or [(0.5, 0.5), (0.25, 0.25), (0.75, 0.75)]
    layers = layers or [0.75, 1.0]
    out.mkdir(parents=True, exist_ok=True)
    outputs = {model.name: run(model, images) for model in models}
    report = {model.name: describe(model, outputs[model.name]) for model in models}
    cka = cka_matrices(models, outputs)
    drawn = {
        'diversity': figures.diversity(report),
        'cka': figures.cka(cka),
        'fourier': figures.fourier(report),
        'attention': figures.attention(images[:2], {model.name: [[
            attention_map(model, outputs[model.name], image, query, share) for share in layers for query in queries]
            for image in range(len(images[:2]))] for model in models}, queries, layers),
    }
    for model in models:
        if (model.settings.get('model') or {}).get('masker'):
            drawn[f'kept-{len(drawn)}'] = figures.kept(model.name, images[:3], *kept_tokens(models, model, images[:3]))
    report['cka'] = {f'{a} / {b}': matrix.tolist() for (a, b), matrix in cka.items()}
    (out / 'report.json').write_text(json.dumps(report, indent=1) + '\n')
    for name, figure in drawn.items():
        figures.save(figure, out / f'{name}.png')
    (out / 'report.html').write_text(page(report, [model.name for model in models], out, list(drawn)))
    return report


def read_images(folder: str | Path, number: int, size: int) -> Tensor:
    """``number`` images spread evenly over a folder, cut to their middle square of ``size`` pixels: (M, 3, s, s)."""
    dataset = ImageFolder(str(folder), pipeline=[])
    indices = torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long().tolist()
    squares = []
    for index in indices:
        image = torch.from_numpy(imread(dataset.get_data_info(index)['img_path'], channel_order='rgb'))
        image = image.permute(2, 0, 1).float()
        side = min(image.shape[-2:])
        top, left = ((length - side) // 2 for length in image.shape[-2:])
        squares.append(resized(image[None, :, top:top + side, left:left + side], size))
    return torch.cat(squares)


def resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode='bicubic', antialias=True).clamp(0, 255)


def run(model: Model, images: Tensor) -> ViTOutput:
    return model.run(resized(images, model.image_size), diversity_taps(model.spec))


def describe(model: Model, output: ViTOutput) -> dict:
    """Of each layer: ``nmi`` and ``distance`` of each head, ``rank``, and the ``fourier`` curve of its map."""
    statistics = layer_statistics(output, model.spec)
    found = {name: [value.tolist() for value in values] for name, values in statistics.items()}
    maps = [output.patches(layer, 'hidden').transpose(1, 2).unflatten(2, output.grid)
            for layer in range(model.spec.depth)]
    return dict(found, fourier=[fourier_log_amplitude(x).tolist() for x in maps], image_size=model.image_size,
                patch_size=model.spec.patch_size, heads=model.spec.num_heads)


def cka_matrices(models: list[Model], outputs: dict[str, ViTOutput]) -> dict[tuple[str, str], Tensor]:
    """Pair of models -> CKA of each layer of the first with each of the second; every model with itself too.

    Tokens of another grid are resampled to that of the first model, bilinearly.
    """
    grid = outputs[models[0].name].grid
    features = {}
    for model in models:
        output = outputs[model.name]
        own = None if output.grid == grid else grid
        step = max(1, len(output.patches(0, 'hidden', grid=own).flatten(0, 1)) // _TOKENS)
        features[model.name] = [output.patches(layer, 'hidden', grid=own).flatten(0, 1)[::step]
                                for layer in range(model.spec.depth)]
    names = [model.name for model in models]
    return {(a, b): torch.tensor([[linear_cka(x, y) for y in features[b]] for x in features[a]])
            for index, a in enumerate(names) for b in names[index:]}


def attention_map(model: Model, output: ViTOutput, image: int, query: tuple[float, float], share: float) -> Tensor:
    """Where the patch at ``query`` of an image looks in one layer, mean over heads: (rows, columns)."""
    layer = max(round(share * model.spec.depth), 1) - 1
    q, k = (output.taps[layer, kind][image:image + 1] for kind in 'qk')
    attention = attention_from_qk(q, k, model.spec.num_heads, output.num_extra_tokens)[0].mean(dim=0)
    row, column = (min(int(place * side), side - 1) for place, side in zip(query, output.grid))
    return attention[row * output.grid[1] + column].unflatten(0, output.grid)


def kept_tokens(models: list[Model], owner: Model, images: Tensor) -> tuple[list[float], list[list[Tensor]]]:
    """What the masker of ``owner``'s config leaves of each image after each stage, at five times of its schedule.

    Scored by the model whose name holds that of the scoring teacher, else by the first.

    Returns:
        Keep rates, one of each time that differs, and for each, per stage, (M, rows, columns) bool.
    """
    cfg = {**owner.settings['model']['masker']}
    scorer = next((model for model in models if cfg.get('teacher') and cfg['teacher'] in model.name), models[0])
    masker = MODELS.build({**cfg, 'place': 'input', 'teacher': cfg.get('teacher') or 'scorer'}
                          if _reads_model(cfg) else cfg)
    masker.bind(scorer.spec)
    hook = next((hook for hook in owner.settings.get('custom_hooks') or []
                 if str(hook.get('type')).endswith('RedundantTokenMasker')), {})
    target = hook.get('keep_rate') or masker.keep_rate
    rates = dict.fromkeys(ramp(time, hook.get('start', 1.0), target, hook.get('schedule', 'constant'))
                          for time in (0.0, 0.25, 0.5, 0.75, 1.0))
    output = scorer.run(resized(images, scorer.image_size), masker.taps or diversity_taps(scorer.spec))
    everything = torch.arange(output.grid[0] * output.grid[1]).expand(len(images), -1)
    strips = []
    for rate in rates:
        masker.keep_rate = rate
        counts = masker.counts(everything.shape[1])
        strips.append([_mask(masker.select(everything, counts[:stage], output), everything, output.grid)
                       for stage in range(1, len(counts) + 1)])
    return list(rates), strips


def _reads_model(masker: dict) -> bool:
    return bool(MODELS.build(masker.get('scorer') or dict(type='mmhdistill.SimilarityScorer')).kinds)


def _mask(keep_ids: Tensor, everything: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.zeros(everything.shape, dtype=torch.bool).scatter(1, keep_ids, True).unflatten(1, grid)


_TITLES = {
    'diversity': 'Attention and tokens by layer. Lines are means over heads, bands reach from the least head to the '
                 'greatest. NMI near 0: every query attends alike.',
    'cka': 'Linear CKA of the layers of each pair of models: 1 where one is a rotation of the other.',
    'fourier': 'Log amplitude of feature maps along the diagonal, relative to frequency 0, by layer.',
    'attention': 'Where the marked patches look, mean over heads.',
    'kept': 'Patches that the masker leaves, by stage and, where its schedule ramps, by keep rate.',
}


def page(report: dict, names: list[str], out: Path, drawn: list[str]) -> str:
    """Self-contained: pictures lie in the text."""
    rows = ''.join(
        f'<tr><td>{html.escape(name)}</td><td>{layer}</td>' + ''.join(
            f'<td>{value:.4f}</td>' for value in (
                _mean(report[name]['nmi'][layer]), _mean(report[name]['distance'][layer]), report[name]['rank'][layer]))
        + '</tr>' for name in names for layer in range(len(report[name]['nmi'])))
    pictures = ''.join(
        f'<h2>{html.escape(_TITLES[name.split("-")[0]])}</h2><img alt="{name}" src="data:image/png;base64,'
        f'{base64.b64encode((out / f"{name}.png").read_bytes()).decode()}">' for name in drawn)
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>mmhdistill: models compared</title><style>'
            'body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}'
            'img{max-width:100%}h2{font-size:1rem;font-weight:600;margin-top:2.5em}table{border-collapse:collapse}'
            'td,th{padding:.2em .9em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child'
            '{text-align:left}</style><h1>Models compared</h1>'
            f'<p>{html.escape(", ".join(names))}</p>{pictures}<h2>Numbers</h2><table><tr><th>model</th><th>layer</th>'
            f'<th>NMI</th><th>distance, px</th><th>effective rank</th></tr>{rows}</table></html>\n')


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
