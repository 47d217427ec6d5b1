"""Fine-tune and measure every model of the study: one JSON file a model, made again where its checkpoint or its
fine-tuning is another.

k-NN and a linear probe of frozen features, accuracy after fine-tuning, NMI, attention distance and effective rank by
layer, and, where a student has losses of features and of relations, the ratio of their gradients.
"""
import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis.ablation import Run, heed_signals, plan, run_all
from mmhdistill.analysis.diversity import diversity_taps, layer_statistics
from mmhdistill.analysis.models import load_images, readouts
from mmhdistill.analysis.probe import linear_probe_predict
from mmhdistill.functional import knn_predict
from mmhdistill.models import ViTTeacher
from mmhdistill.registry import MODELS

HERE = Path(__file__).parent
TEACHERS = ('supervised', 'moco', 'mae', 'moco_longer', 'mae_longer')
IMAGES = dict(train=50_000, test=10_000)


class Model(NamedTuple):
    """``grid`` and ``recipe`` of a student; no ``checkpoint`` stands for random weights."""
    name: str
    cell: str
    seed: int
    checkpoint: Path | None = None
    grid: str | None = None
    recipe: str | None = None

    @property
    def sha256(self) -> str | None:
        return self.checkpoint and hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()


def models(size: str, work: Path) -> list[Model]:
    """Every model that is trained; random weights with every seed of the grid."""
    seeds = Config.fromfile(HERE / size / 'grid.py').seeds
    found = [Model(f'random-{seed}', 'random weights', seed) for seed in seeds]
    found += [Model(f'teacher-{name}', name, 0, last(work / name)) for name in TEACHERS]
    for grid in ('grid', 'sweep'):
        for run in plan(HERE / size / f'{grid}.py', work / grid):
            if (run.folder / 'metrics.json').exists():
                name = '-'.join((grid, run.folder.parent.name, str(run.seed)))
                found.append(Model(name, run.cell, run.seed, last(run.folder), grid, run.recipe))
    return found


def last(folder: Path) -> Path:
    return folder / Path((folder / 'last_checkpoint').read_text()).name


def fine_tune(size: str, work: Path, found: list[Model], jobs: int) -> dict[str, Run]:
    """Runs by name, with the seeds of the models. Random weights are trained as long as a student is, too: its
    distillation and fine-tuning."""
    runs, folder = [], work / 'finetune'
    folder.mkdir(parents=True, exist_ok=True)
    epochs = sum(Config.fromfile(HERE / size / f'{name}.py').train_cfg.max_epochs for name in ('hybrid', 'finetune'))
    for model in found:
        if model.checkpoint is None:
            # Layers of weights that nothing has trained all need to learn.
            scratch = {'model.backbone.init_cfg': None, 'optim_wrapper.paramwise_cfg.layer_decay_rate': 1.0}
            runs.append(_finetune(size, folder, model.name, model.seed, scratch))
            runs.append(_finetune(size, folder, f'{model.name}-longer', model.seed,
                                  {**scratch, 'train_cfg.max_epochs': epochs}))
            continue
        file = model.checkpoint if model.grid else folder / f'{model.name}.pth'
        if not model.grid:  # as init_cfg takes it: other methods' checkpoints are no student's
            torch.save(vit(size, model.checkpoint).vit.state_dict(), file)
        # The digest is kept with the run: one from another checkpoint of this name is not taken for it.
        runs.append(_finetune(size, folder, model.name, model.seed, {
            'model.backbone.init_cfg.checkpoint': f'mmhdistill:{file.resolve()}', 'sha256': model.sha256}))
    rows = run_all(runs, folder, jobs=jobs)
    if failed := [f'{row["cell"]}: {row["failed"]}' for row in rows if 'failed' in row]:
        raise SystemExit('\n'.join(failed))
    return {run.cell: run for run in runs}


def _finetune(size: str, folder: Path, name: str, seed: int, difference: dict) -> Run:
    cfg = Config.fromfile(HERE / size / 'finetune.py')
    cfg.merge_from_dict({**difference, 'randomness.seed': seed})
    return Run(name, seed, folder / name, cfg.pretty_text)


def vit(size: str, checkpoint: Path | None) -> ViTTeacher:
    """The ViT of a model of the study, random without ``checkpoint``, for images as they are normalised in training."""
    card = dict(Config.fromfile(HERE / size / 'hybrid.py').model.teachers.mae.card, name='model')
    found = ViTTeacher(card, checkpoint and str(checkpoint), input_mean=[0.0] * 3, input_std=[1.0] * 3)
    if checkpoint is None:
        found.vit.init_weights()
    found.load()
    return found


@torch.no_grad()
def classify(run: Run, images: Tensor) -> Tensor:
    """Classes that a fine-tuned model tells, (M,)."""
    cfg = Config.fromstring(run.recipe, '.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build({**cfg.model, 'backbone': {**cfg.model.backbone, 'init_cfg': None}})
    model.load_state_dict(torch.load(last(run.folder), weights_only=True)['state_dict'], strict=True)
    model.eval()
    mean, std = (torch.tensor(cfg.model.data_preprocessor[name]).view(3, 1, 1) for name in ('mean', 'std'))
    return torch.cat([model((part - mean) / std, mode='tensor').argmax(dim=1) for part in images.split(512)])


def measure(size: str, model: Model, data: dict) -> dict:
    """Of frozen features and attention; and the ratio of gradients."""
    torch.manual_seed(model.seed)
    frozen_vit = vit(size, model.checkpoint)
    bank, queries = (readouts(frozen_vit, data[split][0]) for split in ('train', 'test'))
    found = frozen(bank['patch'], queries['patch'], data)
    found['knn_cls'] = frozen(bank['cls'], queries['cls'], data, linear=False)['knn']
    held_out = data['test'][0][::20].float()
    grid = tuple(side // frozen_vit.spec.patch_size for side in held_out.shape[-2:])
    statistics = layer_statistics(
        frozen_vit(held_out, grid, diversity_taps(frozen_vit.spec)), frozen_vit.spec)
    found.update((name, [value.tolist() for value in values]) for name, values in statistics.items())
    if model.recipe is not None:
        found['gradient_ratio'] = gradient_ratio(model.recipe, model.checkpoint, spread(data['train'][0], 256))
    return found


def measure_all(size: str, todo: list[tuple[Model, dict[str, Run]]], data: dict, jobs: int) -> Iterator[dict]:
    """What is known of each model with its fine-tunings, ``jobs`` of them at a time."""
    work = partial(_measure_one, size, data)
    if jobs == 1:
        yield from map(work, todo)
        return
    with ProcessPoolExecutor(jobs, get_context('spawn'), torch.set_num_threads,
                             (max(1, torch.get_num_threads() // jobs), )) as pool:
        yield from pool.map(work, todo)


def _measure_one(size: str, data: dict, todo: tuple[Model, dict[str, Run]]) -> dict:
    (model, runs), (images, labels) = todo, data['test']
    result = measure(size, model, data)
    for name, run in runs.items():
        fine = scores({name: classify(run, images) == labels})
        result['right'].update(fine.pop('right'))
        result.update(fine)
    return result


def frozen(bank: Tensor, queries: Tensor, data: dict, linear: bool = True) -> dict:
    """Accuracy in percent, and in ``right`` which test images are classified rightly."""
    (_, bank_labels), (_, labels) = data['train'], data['test']
    classes = dict(knn=knn_predict(bank, bank_labels, queries, num_classes=10))
    if linear:
        classes['linear'] = linear_probe_predict(bank, bank_labels, queries)
    return scores({name: found == labels for name, found in classes.items()})


def scores(right: dict[str, Tensor]) -> dict:
    """Name -> accuracy in percent; ``right``: name -> bit of each image, packed, in hexadecimal."""
    return dict({name: 100 * bits.double().mean().item() for name, bits in right.items()},
                right={name: np.packbits(bits.numpy()).tobytes().hex() for name, bits in right.items()})


def spread(images: Tensor, count: int) -> Tensor:
    """``count`` images from the first to the last: they lie class by class."""
    return images[torch.linspace(0, len(images) - 1, count).long()]


def gradient_ratio(recipe: str, checkpoint: Path, images: Tensor) -> float | None:
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


def provenance() -> dict:
    """What results are made with."""
    digest = hashlib.sha256()
    for split, count in IMAGES.items():
        paths = sorted(Path('data/cifar10', split).glob('*/*.jpg'))
        if len(paths) != count:
            raise SystemExit(f'data/cifar10/{split} has {len(paths)} images in place of {count}: remove data/cifar10 '
                             'and run run.sh again.')
        for path in paths:
            digest.update(path.read_bytes())
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    commit = subprocess.run(['git', '-C', HERE, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout
    versions = [f'{name} {importlib.import_module(name).__version__}' for name in (
        'torch', 'mmengine', 'mmcv', 'mmpretrain', 'numpy', 'sklearn')]
    return dict(
        date=date.today().isoformat(),
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else
        f'{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}',
        versions=', '.join([f'mmhdistill at {commit.strip() or "no commit"}', f'Python {platform.python_version()}',
                            *versions]),
        images=digest.hexdigest())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('size', choices=['cpu', 'gpu'])
    parser.add_argument('--work', type=Path, default=Path('work_dirs'), help='where the runs are')
    parser.add_argument('--out', type=Path, help='where results go; results/<size> in --work by default')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='models at a time; 1 by default')
    args = parser.parse_args()
    heed_signals()
    out = args.out or args.work / 'results' / args.size
    out.mkdir(parents=True, exist_ok=True)
    made_with, found = provenance(), models(args.size, args.work)
    try:
        tuned = fine_tune(args.size, args.work, found, args.jobs)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    cfg = Config.fromfile(HERE / args.size / 'hybrid.py')
    data = dict(train=[part[::cfg.train_dataloader.dataset.stride] for part in load_images('data/cifar10/train')],
                test=load_images('data/cifar10/test'))
    pixels = frozen(*(data[split][0].flatten(1).float() for split in ('train', 'test')), data)
    write(out / 'pixels.json', dict(cell='raw pixels', seed=0, grid=None, **pixels, made_with=made_with))
    files = {model.name: out / f'{model.name}.json' for model in found}
    for file in {*out.glob('*.json')} - {*files.values(), out / 'pixels.json', out / 'cost.json'}:
        file.unlink()  # of a model that is no more
    todo, made_from = [], {}
    for model in found:
        runs = dict(finetune=tuned[model.name])
        if model.checkpoint is None:
            runs['finetune_longer'] = tuned[f'{model.name}-longer']
        made_from[model.name] = dict(checkpoint=model.sha256, **{
            name: hashlib.sha256(run.recipe.encode()).hexdigest() for name, run in runs.items()})
        file = files[model.name]
        if not (file.exists() and json.loads(file.read_text())['made_from'] == made_from[model.name]):
            todo.append((model, runs))
    for (model, _), result in zip(todo, measure_all(args.size, todo, data, args.jobs)):
        write(files[model.name], dict(cell=model.cell, seed=model.seed, grid=model.grid,
                                      made_from=made_from[model.name], **result, made_with=made_with))
        print(model.name, {key: result.get(key) for key in ('knn', 'linear', 'finetune', 'gradient_ratio')}, flush=True)


def write(file: Path, result: dict) -> None:
    partial = file.with_suffix('.part')
    partial.write_text(json.dumps(result, indent=1) + '\n')
    partial.replace(file)


if __name__ == '__main__':
    main()
