"""The quick start's report: table, JSON and figure of two teachers and their students."""
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor

from ..functional import knn_accuracy
from ..models import ViTTeacher
from ..models.losses.token_relation_loss import default_layer_pairs
from ..registry import MODELS
from .models import load_images, nmi_by_layer, precision_error, readouts, relation_distance
from .studies import STUDIES, Model, Study


def report(folder: str | Path, method: str) -> dict:
    """Measure the models in ``folder`` and write ``<method>.json``, ``<method>.md`` and ``<method>.png`` there.

    Args:
        method: ``hybrid`` or ``moma``, see :data:`mmhdistill.analysis.studies.STUDIES`.
    """
    folder, study = Path(folder), STUDIES[method]
    # Named last: the student of both teachers.
    cfg = Config.fromfile(next((folder / list(study.students)[-1]).glob('*.py')))
    distiller = _distiller(cfg)
    models = _models(folder, study, dict(cfg.model.teachers.mae.card))
    depth = models['mae'].spec.depth
    layers = default_layer_pairs(depth, depth)
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
    for name in study.teachers:
        grid = tuple(side // models[name].spec.patch_size for side in held_out.shape[-2:])
        results[name]['bfloat16'] = precision_error(models[name], held_out, grid, [layer for _, layer in layers])
    for name in ('random', *study.students):
        results[name]['relation_kl'] = relation_distance(models[name], models['mae'], held_out, layers)
    curves = {name: loss_curves(folder / name) for name in study.students}
    for name, losses in curves.items():
        results[name]['losses'] = {key: [values[0][1], values[-1][1]] for key, values in losses.items()}
    results['relation_layers'] = [layer for layer, _ in layers]
    out = {suffix: folder / f'{method}.{suffix}' for suffix in ('json', 'md', 'png')}
    out['json'].write_text(json.dumps(results, indent=2) + '\n')
    table = format_table(results, study)
    out['md'].write_text(table)
    print(table)
    for claim, holds in study.claims(results).items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    from .quickstart_figure import draw
    draw(out['png'], study, results, curves, *kept_tokens(distiller, queries[[7, 340, 600, 1100]]))
    print(f"figure: {out['png']}")
    return results


def loss_curves(work_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss name -> (iteration, mean of the last 20) from ``scalars.json`` of every start; a later start stands for what
    an earlier one did from there on."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for scalars in sorted(work_dir.glob('*/vis_data/scalars.json')):
        seen: dict[str, list[tuple[int, float]]] = {}
        for line in scalars.read_text().splitlines():
            entry = json.loads(line)
            for key, value in entry.items():
                if key.startswith('loss/'):
                    seen.setdefault(key, []).append((entry['step'], value))
        for key, values in seen.items():
            curves[key] = [point for point in curves.get(key, []) if point[0] < values[0][0]] + values
    return curves


def format_table(results: dict, study: Study) -> str:
    """Markdown: k-NN accuracy and NMI by layer of every model, held-out relation KL and losses of the students."""
    layers = results['relation_layers']
    depth = len(results['mae']['nmi'])
    losses = loss_names(results[name]['losses'] for name in study.students)
    head = ['model', 'k-NN %', 'over start', 'of CLS',
            *(f'NMI {layer}{"*" if layer in layers else ""}' for layer in range(depth)), 'relation KL to MAE',
            *(key.replace('loss/', '') + ' loss' for key in losses)]
    rows = [head, ['---', *['---:'] * (len(head) - 1)]]
    for name, label in study.labels.items():
        row = results[name]
        student = study.students.get(name)
        gain = f"{row['knn'] - results[student.start]['knn']:+.1f}" if student else '-'
        nmi = [f'{value:.4f}' for value in row.get('nmi', [])] or ['-'] * depth
        kl = f"{row['relation_kl']:.3f}" if 'relation_kl' in row else '-'
        of_cls = f"{row['knn_cls']:.1f}" if 'knn_cls' in row else '-'
        spans = [_span(row.get('losses', {}).get(key)) for key in losses]
        rows.append([label, f"{row['knn']:.1f}", gain, of_cls, *nmi, kl, *spans])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    starts = ', '.join(f'"{model.label}" from {_start(study, model)}' for model in study.students.values())
    note = ('k-NN: weighted, k = 20, mean patch token (of CLS: class token), test crops from the unseen right 30 % of '
            f'each photograph; over start: points gained over the weights that a student started from ({starts}). NMI: '
            'layers from 0, * = layer of the relation KL; near 0, every query attends alike. Losses: first and '
            'last mean of 20 iterations.')
    return '\n'.join(lines) + f'\n\n{note}\n'


def loss_names(curves: Iterable[dict]) -> list[str]:
    """Every loss of any student, in the order in which they first come."""
    return list(dict.fromkeys(key for losses in curves for key in losses))


def kept_tokens(distiller, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Grey images (M, H, W) in 0-255, and after each masking stage which patches are left, (M, rows, columns) bool."""
    masker = distiller.masker
    mean, std = distiller.data_preprocessor.mean, distiller.data_preprocessor.std
    patch = distiller.backbone.spec.patch_size
    grid = tuple(side // patch for side in images.shape[-2:])
    reference = None
    if masker.teacher is not None:
        reference = distiller.teachers[masker.teacher]((images - mean) / std, grid, masker.taps)
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


def _models(folder: Path, study: Study, card: dict) -> dict[str, ViTTeacher]:
    """Every model as a frozen ViT that takes raw RGB pixels."""
    checkpoints = {name: (folder / name / 'last_checkpoint').read_text() for name in (*study.teachers, *study.students)}
    models = {}
    for name in ('random', *checkpoints):
        torch.manual_seed(0)
        models[name] = ViTTeacher({**card, 'name': name}, checkpoints.get(name), name=name, input_mean=[0.0] * 3,
                                  input_std=[1.0] * 3)
        if name == 'random':
            models[name].vit.init_weights()
        models[name].load()
    return models


def _start(study: Study, student: Model) -> str:
    return 'random weights' if student.start == 'random' else study.teachers[student.start].label


def _span(values: list[float] | None) -> str:
    return f'{values[0]:.3f} -> {values[1]:.3f}' if values else '-'
