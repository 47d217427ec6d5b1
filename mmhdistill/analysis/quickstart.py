"""The quick start's report: table, JSON and figure of two teachers and two students."""
import json
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor

from ..functional import knn_accuracy
from ..models import ViTTeacher
from ..registry import MODELS
from .models import load_images, nmi_by_layer, readouts, relation_distance

# Okabe-Ito colours: told apart by colour-blind readers and in grey.
COLOURS = {'supervised': '#E69F00', 'mae': '#0072B2', 'cl-only': '#D55E00', 'hybrid': '#009E73'}
LABELS = {
    'pixels': 'raw pixels', 'random': 'student, random weights', 'supervised': 'teacher 1: supervised ViT',
    'mae': 'teacher 2: MAE', 'cl-only': "student of teacher 1's features", 'hybrid': 'Hybrid Distill student'
}


def report(folder: str | Path) -> dict:
    """Measure the models in ``folder`` and write ``results.json``, ``table.md`` and ``figure.png`` there."""
    folder = Path(folder)
    cfg = Config.fromfile(next((folder / 'hybrid').glob('*.py')))
    distiller = _distiller(cfg)
    relation = distiller.losses['relation']
    models = _models(folder, cfg)
    bank, bank_labels = load_images(folder / 'data' / 'train')
    queries, query_labels = load_images(folder / 'data' / 'test')
    held_out = queries[::6]

    def knn(bank_features: Tensor, query_features: Tensor) -> float:
        return knn_accuracy(bank_features, bank_labels, query_features, query_labels)

    def pixels(images: Tensor) -> Tensor:
        return images[:, 0].flatten(1) - distiller.data_preprocessor.mean[0, 0]

    results = {'pixels': dict(knn=knn(pixels(bank), pixels(queries)))}
    for name, model in models.items():
        ours, theirs = readouts(model, bank), readouts(model, queries)
        results[name] = dict(knn=knn(ours['patch'], theirs['patch']), knn_cls=knn(ours['cls'], theirs['cls']),
                             nmi=nmi_by_layer(model, held_out))
    for name in ('random', 'cl-only', 'hybrid'):
        results[name]['relation_kl'] = relation_distance(models[name], models['mae'], held_out, relation.layers)
    for name in ('cl-only', 'hybrid'):
        curves = loss_curves(folder / name)
        results[name]['losses'] = {key: [values[0][1], values[-1][1]] for key, values in curves.items()}
    results['relation_layers'] = [layer for layer, _ in relation.layers]
    (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    table = format_table(results)
    (folder / 'table.md').write_text(table)
    print(table)
    for claim, holds in verdicts(results).items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    from .quickstart_figure import draw
    draw(folder / 'figure.png', results, {name: loss_curves(folder / name) for name in ('cl-only', 'hybrid')},
         *kept_tokens(distiller, queries[[7, 340, 600, 1100]]))
    print(f"figure: {folder / 'figure.png'}")
    return results


def verdicts(results: dict) -> dict[str, bool]:
    """What the quick start is meant to show, each claim with whether these results bear it out."""
    hybrid, cl_only, random = results['hybrid'], results['cl-only'], results['random']
    layers = results['relation_layers']

    def mean_nmi(result: dict) -> float:
        return sum(result['nmi'][layer] for layer in layers) / len(layers)

    claims = {
        'Hybrid k-NN is 20 points above the random student': hybrid['knn'] >= random['knn'] + 20,
        'Hybrid k-NN is above raw pixels': hybrid['knn'] > results['pixels']['knn'],
        "Hybrid NMI at the relation layers is 3 times that of the student of teacher 1's features":
            mean_nmi(hybrid) >= 3 * mean_nmi(cl_only),
        "Hybrid relations are nearer to the MAE's than those of the student of teacher 1's features":
            hybrid['relation_kl'] < cl_only['relation_kl'],
    }
    for name in ('loss/feature', 'loss/relation'):
        first, last = hybrid['losses'].get(name, (0.0, 1.0))
        claims[f'{name} falls by 30 %'] = last <= 0.7 * first
    return claims


def loss_curves(work_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss name -> (iteration, mean of the last 20) from the newest run's ``scalars.json``."""
    newest = max(work_dir.glob('*/vis_data/scalars.json'))
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in newest.read_text().splitlines():
        entry = json.loads(line)
        for key, value in entry.items():
            if key.startswith('loss/'):
                curves.setdefault(key, []).append((entry['step'], value))
    return curves


def format_table(results: dict) -> str:
    """Markdown: k-NN accuracy and NMI by layer of every model, held-out relation KL and losses of the students."""
    layers = results['relation_layers']
    depth = len(results['mae']['nmi'])
    head = ['model', 'k-NN %', 'of CLS', *(f'NMI {layer}{"*" if layer in layers else ""}' for layer in range(depth)),
            'relation KL to MAE', 'feature loss', 'relation loss']
    rows = [head, ['---', *['---:'] * (len(head) - 1)]]
    for name, label in LABELS.items():
        row = results[name]
        nmi = [f'{value:.4f}' for value in row.get('nmi', [])] or ['-'] * depth
        kl = f"{row['relation_kl']:.3f}" if 'relation_kl' in row else '-'
        losses = [_span(row.get('losses', {}).get(key)) for key in ('loss/feature', 'loss/relation')]
        of_cls = f"{row['knn_cls']:.1f}" if 'knn_cls' in row else '-'
        rows.append([label, f"{row['knn']:.1f}", of_cls, *nmi, kl, *losses])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    note = ('k-NN: weighted, k = 20, mean patch token (of CLS: class token), test crops from the unseen right 30 % of '
            'each photograph. NMI: layers from 0, * = relation layer; near 0, every query attends alike. Losses: first '
            'and last mean of 20 iterations.')
    return '\n'.join(lines) + f'\n\n{note}\n'


def kept_tokens(distiller, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Grey images (M, H, W) in 0-255, and after each masking stage which patches are left, (M, rows, columns) bool."""
    masker, teacher = distiller.masker, distiller.teachers[distiller.masker.teacher]
    mean, std = distiller.data_preprocessor.mean, distiller.data_preprocessor.std
    patch = distiller.backbone.spec.patch_size
    grid = tuple(side // patch for side in images.shape[-2:])
    reference = teacher((images - mean) / std, grid, masker.taps)
    everything = torch.arange(grid[0] * grid[1]).expand(len(images), -1)
    counts, kept = masker.counts(everything.shape[1]), []
    for stage in range(1, len(counts) + 1):
        keep_ids = masker.select(everything, counts[:stage], reference)
        kept.append(torch.zeros(everything.shape, dtype=torch.bool).scatter(1, keep_ids, True).unflatten(1, grid))
    return images[:, 0], kept


def _distiller(cfg: Config):
    distiller = MODELS.build(cfg.model)
    for teacher in distiller.teachers.values():
        teacher.load()
    return distiller


def _models(folder: Path, cfg: Config) -> dict[str, ViTTeacher]:
    """Every model as a frozen ViT that takes raw RGB pixels."""
    card = dict(cfg.model.teachers.mae.card)
    checkpoints = {name: (folder / name / 'last_checkpoint').read_text() for name in
                   ('supervised', 'mae', 'cl-only', 'hybrid')}
    models = {}
    for name in ('random', *checkpoints):
        torch.manual_seed(0)
        models[name] = ViTTeacher({**card, 'name': name}, checkpoints.get(name), name=name, input_mean=[0.0] * 3,
                                  input_std=[1.0] * 3)
        if name == 'random':
            models[name].vit.init_weights()
        models[name].load()
    return models


def _span(values: list[float] | None) -> str:
    return f'{values[0]:.3f} -> {values[1]:.3f}' if values else '-'
