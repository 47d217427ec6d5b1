"""Measure every model of the study: one JSON file a model, which is not made again while it is there.

k-NN and a linear probe of frozen features, accuracy after fine-tuning, NMI, attention distance and effective rank by
layer, and, where a student has losses of features and of relations, the ratio of their gradients.
"""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis.ablation import plan
from mmhdistill.analysis.diversity import diversity_taps, layer_statistics
from mmhdistill.analysis.models import load_images, readouts
from mmhdistill.analysis.probe import linear_probe_accuracy
from mmhdistill.functional import knn_accuracy
from mmhdistill.models import ViTTeacher
from mmhdistill.registry import MODELS

HERE = Path(__file__).parent
TEACHERS = ('supervised', 'moco', 'mae')


def checkpoints(size: str, work: Path) -> dict[str, tuple[Path | None, str | None]]:
    """File name of the results -> checkpoint and recipe of a distilled student, for every model that is trained."""
    found = {'random': (None, None)}
    for name in TEACHERS:
        found[f'teacher-{name}'] = last(work / name), None
    for grid in ('grid', 'sweep'):
        for run in plan(HERE / size / f'{grid}.py', work / grid):
            if (run.folder / 'metrics.json').exists():
                name = '-'.join((grid, run.folder.parent.name, str(run.seed)))
                found[name] = last(run.folder), run.recipe
    return found


def last(folder: Path) -> Path:
    return folder / Path((folder / 'last_checkpoint').read_text()).name


def measure(checkpoint: Path | None, recipe: str | None, card: dict, data: dict, finetune: list[str]) -> dict:
    torch.manual_seed(0)
    model = ViTTeacher(card, checkpoint and str(checkpoint), input_mean=[0.0] * 3, input_std=[1.0] * 3)
    if checkpoint is None:
        model.vit.init_weights()
    model.load()
    bank, queries = (readouts(model, data[split][0]) for split in ('train', 'test'))
    labels = data['train'][1], data['test'][1]
    found = dict(
        knn=knn_accuracy(bank['patch'], labels[0], queries['patch'], labels[1]),
        knn_cls=knn_accuracy(bank['cls'], labels[0], queries['cls'], labels[1]),
        linear=linear_probe_accuracy(bank['patch'], labels[0], queries['patch'], labels[1]))
    held_out = data['test'][0][::4].float()
    grid = tuple(side // model.spec.patch_size for side in held_out.shape[-2:])
    statistics = layer_statistics(model(held_out, grid, diversity_taps(model.spec)), model.spec)
    found.update((name, [value.tolist() for value in values]) for name, values in statistics.items())
    if recipe is not None:
        found['gradient_ratio'] = gradient_ratio(recipe, checkpoint, data['train'][0][:256])
    found['finetune'] = fine_tuned(finetune, checkpoint)
    return found


def gradient_ratio(recipe: str, checkpoint: Path, images: torch.Tensor) -> float | None:
    """Norm of the relations' gradient in the student over that of the features', weights of the losses included."""
    cfg = Config.fromstring(recipe, '.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = MODELS.build(cfg.model)
    if {'feature', 'relation'} - set(distiller.losses) or cfg.model.losses.relation.type != (
            'mmhdistill.TokenRelationLoss'):
        return None
    distiller.init_weights()
    distiller.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], strict=True)
    losses = distiller.loss((images - distiller.data_preprocessor.mean) / distiller.data_preprocessor.std)
    student = [p for p in distiller.backbone.parameters() if p.requires_grad]
    norms = {}
    for name in ('feature', 'relation'):
        gradients = torch.autograd.grad(losses[f'loss/{name}'], student, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    return norms['relation'] / norms['feature']


def fine_tuned(command: list[str], checkpoint: Path | None) -> float:
    start = 'model.backbone.init_cfg' + ('=None' if checkpoint is None else f'.checkpoint=mmhdistill:{checkpoint}')
    done = subprocess.run([*command, '--cfg-options', start], capture_output=True, text=True)
    scores = re.findall(r'accuracy/top1: ([\d.]+)', done.stdout + done.stderr)
    if done.returncode or not scores:
        raise RuntimeError(f'{" ".join(command)} failed:\n{done.stderr[-2000:]}')
    return float(scores[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('size', choices=['cpu', 'gpu'])
    parser.add_argument('--work', type=Path, default=Path('work_dirs'), help='where the runs are')
    parser.add_argument('--out', type=Path, help='where results go; results/<size> of the study by default')
    args = parser.parse_args()
    out = args.out or HERE / 'results' / args.size
    out.mkdir(parents=True, exist_ok=True)
    cfg = Config.fromfile(HERE / args.size / 'hybrid.py')
    card = dict(cfg.model.teachers.mae.card, name='model')
    stride = cfg.train_dataloader.dataset.stride
    data = {split: [part[::stride] for part in load_images(f'data/cifar10/{split}')] for split in ('train', 'test')}
    train = [sys.executable, 'tools/train.py', str(HERE / args.size / 'finetune.py')]
    for name, (checkpoint, recipe) in checkpoints(args.size, args.work).items():
        file = out / f'{name}.json'
        if file.exists():
            continue
        found = measure(checkpoint, recipe, card, data, [*train, '--work-dir', str(args.work / 'finetune' / name)])
        partial = file.with_suffix('.part')
        partial.write_text(json.dumps(found, indent=1) + '\n')
        partial.replace(file)
        print(name, {key: found.get(key) for key in ('knn', 'linear', 'finetune', 'gradient_ratio')}, flush=True)


if __name__ == '__main__':
    main()
