"""Fine-tune and measure every model of the study: one JSON file a model, which is not made again while it is there.

k-NN and a linear probe of frozen features, accuracy after fine-tuning, NMI, attention distance and effective rank by
layer, and, where a student has losses of features and of relations, the ratio of their gradients.
"""
import argparse
import hashlib
import json
import os
import platform
import re
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis.ablation import Run, plan, run_all
from mmhdistill.analysis.diversity import diversity_taps, layer_statistics
from mmhdistill.analysis.models import load_images, readouts
from mmhdistill.analysis.probe import linear_probe_accuracy
from mmhdistill.functional import knn_accuracy
from mmhdistill.models import ViTTeacher
from mmhdistill.registry import MODELS

HERE = Path(__file__).parent
TEACHERS = ('supervised', 'moco', 'mae')


class Model(NamedTuple):
    """``grid`` and ``recipe`` of a student; no ``checkpoint`` stands for random weights."""
    name: str
    cell: str
    seed: int
    checkpoint: Path | None = None
    grid: str | None = None
    recipe: str | None = None


def models(size: str, work: Path) -> list[Model]:
    """Every model that is trained."""
    found = [Model('random', 'random weights', 0)]
    found += [Model(f'teacher-{name}', name, 0, last(work / name)) for name in TEACHERS]
    for grid in ('grid', 'sweep'):
        for run in plan(HERE / size / f'{grid}.py', work / grid):
            if (run.folder / 'metrics.json').exists():
                name = '-'.join((grid, run.folder.parent.name, str(run.seed)))
                found.append(Model(name, run.cell, run.seed, last(run.folder), grid, run.recipe))
    return found


def last(folder: Path) -> Path:
    return folder / Path((folder / 'last_checkpoint').read_text()).name


def fine_tuned(size: str, work: Path, found: list[Model], jobs: int) -> dict[str, float]:
    """Accuracy by name. Random weights are trained as long as a student is, too: its distillation and fine-tuning."""
    runs = []
    for model in found:
        start = model.checkpoint and dict(checkpoint=f'mmhdistill:{model.checkpoint.resolve()}')
        runs.append(_finetune(size, work, model.name, {'model.backbone.init_cfg': start}))
    epochs = sum(Config.fromfile(HERE / size / f'{name}.py').train_cfg.max_epochs for name in ('hybrid', 'finetune'))
    runs.append(_finetune(
        size, work, 'random-longer', {'model.backbone.init_cfg': None, 'train_cfg.max_epochs': epochs}))
    rows = run_all(runs, jobs=jobs)
    if failed := [f'{row["cell"]}: {row["failed"]}' for row in rows if 'failed' in row]:
        raise SystemExit('\n'.join(failed))
    return {row['cell']: row['accuracy/top1'] for row in rows}


def _finetune(size: str, work: Path, name: str, difference: dict) -> Run:
    cfg = Config.fromfile(HERE / size / 'finetune.py')
    cfg.merge_from_dict(difference)
    return Run(name, 0, work / 'finetune' / name, cfg.pretty_text)


def measure(model: Model, card: dict, data: dict) -> dict:
    """Of frozen features and attention; and the ratio of gradients."""
    torch.manual_seed(0)
    vit = ViTTeacher(card, model.checkpoint and str(model.checkpoint), input_mean=[0.0] * 3, input_std=[1.0] * 3)
    if model.checkpoint is None:
        vit.vit.init_weights()
    vit.load()
    bank, queries = (readouts(vit, data[split][0]) for split in ('train', 'test'))
    labels = data['train'][1], data['test'][1]
    found = dict(
        cell=model.cell, seed=model.seed, grid=model.grid,
        knn=knn_accuracy(bank['patch'], labels[0], queries['patch'], labels[1]),
        knn_cls=knn_accuracy(bank['cls'], labels[0], queries['cls'], labels[1]),
        linear=linear_probe_accuracy(bank['patch'], labels[0], queries['patch'], labels[1]))
    held_out = data['test'][0][::20].float()
    grid = tuple(side // vit.spec.patch_size for side in held_out.shape[-2:])
    statistics = layer_statistics(vit(held_out, grid, diversity_taps(vit.spec)), vit.spec)
    found.update((name, [value.tolist() for value in values]) for name, values in statistics.items())
    if model.recipe is not None:
        found['gradient_ratio'] = gradient_ratio(model.recipe, model.checkpoint, data['train'][0][:256])
    return found


def gradient_ratio(recipe: str, checkpoint: Path, images: torch.Tensor) -> float | None:
    """Norm of the relations' gradient in the student over that of the features', weights of the losses included."""
    cfg = Config.fromstring(recipe, '.py')
    if {'feature', 'relation'} - {name for name, loss in cfg.model.losses.items() if loss} or (
            cfg.model.losses.relation.type != 'mmhdistill.TokenRelationLoss'):
        return None
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = MODELS.build(cfg.model)
    distiller.init_weights()
    distiller.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], strict=True)
    losses = distiller.loss((images - distiller.data_preprocessor.mean) / distiller.data_preprocessor.std)
    student = [p for p in distiller.backbone.parameters() if p.requires_grad]
    norms = {}
    for name in ('feature', 'relation'):
        gradients = torch.autograd.grad(losses[f'loss/{name}'], student, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    return norms['relation'] / norms['feature']


def provenance(size: str) -> dict:
    """What results are made with."""
    digest, count = hashlib.sha256(), 0
    for path in sorted(Path('data/cifar10').glob('t*/*/*.jpg')):
        digest.update(path.read_bytes())
        count += 1
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    return dict(
        date=date.today().isoformat(), command=f'bash studies/hybrid_on_cifar10/run.sh {size}',
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else
        f'{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}',
        versions=dict(python=platform.python_version(), **{
            name: metadata.version(name) for name in ('mmhdistill', 'torch', 'mmengine', 'mmcv', 'mmpretrain', 'numpy',
                                                      'scikit-learn')}),
        data=f'{count} JPEG files, sha256 of all in the order of their paths {digest.hexdigest()}')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('size', choices=['cpu', 'gpu'])
    parser.add_argument('--work', type=Path, default=Path('work_dirs'), help='where the runs are')
    parser.add_argument('--out', type=Path, help='where results go; results/<size> of the study by default')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='fine-tunings at a time; 1 by default')
    args = parser.parse_args()
    out = args.out or HERE / 'results' / args.size
    out.mkdir(parents=True, exist_ok=True)
    found = models(args.size, args.work)
    accuracy = fine_tuned(args.size, args.work, found, args.jobs)
    cfg = Config.fromfile(HERE / args.size / 'hybrid.py')
    card = dict(cfg.model.teachers.mae.card, name='model')
    stride = cfg.train_dataloader.dataset.stride
    data = dict(train=[part[::stride] for part in load_images('data/cifar10/train')],
                test=load_images('data/cifar10/test'))
    for model in found:
        file = out / f'{model.name}.json'
        if file.exists():
            continue
        result = dict(measure(model, card, data), finetune=accuracy[model.name])
        if model.name == 'random':
            result['finetune_longer'] = accuracy['random-longer']
        (out / 'run.json').write_text(json.dumps(provenance(args.size), indent=1) + '\n')
        partial = file.with_suffix('.part')
        partial.write_text(json.dumps(result, indent=1) + '\n')
        partial.replace(file)
        print(model.name, {key: result.get(key) for key in ('knn', 'linear', 'finetune', 'gradient_ratio')}, flush=True)


if __name__ == '__main__':
    main()
