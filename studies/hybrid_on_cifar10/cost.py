"""Time and memory of one training step of every method of the study, each in a process of its own.

    python studies/hybrid_on_cifar10/cost.py cpu

Measured once, while cost.json is there. Nothing else should run meanwhile. Of each of four rounds over all methods:
time is the median of its steps; memory is the peak of a step beyond what was there before the first: resident on a
CPU, allocated on a GPU.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis.ablation import plan
from mmhdistill.analysis.benchmark import measure_memory
from mmhdistill.registry import MODELS

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from studies.hybrid_on_cifar10.measure import provenance, write  # noqa: E402

GPU = torch.cuda.is_available()
# That all of one method are below all of another by chance has the probability 1/70, less than claims.LEVEL.
ROUNDS = 4


def steps(cfg: Config, warmup: int = 5, count: int = 20) -> dict:
    """``ms``, the median of ``count`` steps, and ``mib``, with random images and random teachers."""
    for teacher in cfg.model.teachers.values():
        teacher.checkpoint = None
    if cfg.model.backbone.get('init_from'):
        cfg.model.backbone.init_from.checkpoint = None
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = MODELS.build(cfg.model)
        distiller.init_weights()
        distiller.train().to('cuda' if GPU else 'cpu')
        optimizer = build_optim_wrapper(distiller, cfg.optim_wrapper)
    size = cfg.train_dataloader.batch_size
    images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8)
    times = []

    def step():
        start = time.perf_counter()
        distiller.train_step(dict(inputs=list(images)), optimizer)
        if GPU:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    mib = measure_memory(step, warmup + count)
    return dict(ms=median(times[warmup:]), mib=mib)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('size', choices=['cpu', 'gpu'])
    parser.add_argument('--cell', help='this one alone, in this process')
    parser.add_argument('--out', type=Path, help='where cost.json goes; work_dirs/results/<size> by default')
    args = parser.parse_args()
    recipes = {run.cell: run.recipe for run in plan(HERE / args.size / 'grid.py', Path('work_dirs/grid'))}
    if args.cell:
        print(json.dumps(steps(Config.fromstring(recipes[args.cell], '.py'))))
        return
    out = args.out or Path('work_dirs/results', args.size)
    if (out / 'cost.json').exists():
        print(f'{out}/cost.json: done before')
        return
    costs = {cell: dict(ms=[], mib=[]) for cell in recipes}
    for _ in range(ROUNDS):
        for cell in recipes:
            done = subprocess.run([sys.executable, __file__, args.size, '--cell', cell], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                costs[cell][name].append(value)
    out.mkdir(parents=True, exist_ok=True)
    write(out / 'cost.json', dict(cells=costs, threads=torch.get_num_threads(), made_with=provenance()))
    for cell, cost in costs.items():
        print(f'{cell}: {median(cost["ms"]):.1f} ms, {median(cost["mib"]):.0f} MiB')


if __name__ == '__main__':
    main()
