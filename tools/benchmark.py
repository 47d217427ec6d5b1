"""What a step of distillation costs, by part and as a ratio to the naive way, on this machine.

The naive way keeps eager attention maps and N x N relations for backward, masks nothing and runs teachers to their end;
both ways are measured in turn in one run. Data are random images, teachers have random weights.
"""
import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import cv2
import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis import benchmark
from mmhdistill.analysis.plan import plan
from mmhdistill.compat import config_path
from mmhdistill.engine import DiversityReportHook
from mmhdistill.engine.config_guard import merge_checked

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
RECIPE = 'mmhdistill::hdistill/vit-b_clip-mae_300e.py'
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# What a GPU trains in; an emulated bfloat16 is slow.
HALF = 'bfloat16' if DEVICE == 'cpu' or torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('config', nargs='?', help='of a distiller: its step by part, and the naive one')
    what.add_argument('--suite', choices=['paper'], help='the cases of docs/benchmarks.md')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config, for example train_dataloader.batch_size=64')
    parser.add_argument('--dtype', choices=list(DTYPES),
                        help='float32, or autocast to another; of a config by default float32 on CPU, and on GPU '
                        'bfloat16 if it has it, else float16; of the suite float32 and that')
    parser.add_argument('--repeats', type=int, default=5, help='runs whose median is taken')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write what was measured')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f'--repeats is {args.repeats}: give at least 1')
    return args


def synchronise() -> None:
    if DEVICE == 'cuda':
        torch.cuda.synchronize()


def child(task: dict):
    """One measurement, for a process of its own."""
    dtype = DTYPES[task['dtype']]
    if task['measure'] == 'rates':
        cfg = Config.fromstring(task['config'], '.py')
        cv2.setNumThreads(0)  # as in a worker
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            images = benchmark.data_rate(cfg.train_dataloader.dataset)
        # A GPU is through with a small one before the next could be started.
        side = 8192 if DEVICE == 'cuda' else 2048
        return dict(matmul=benchmark.matmul_rate(dtype, DEVICE, side, synchronise=synchronise), data=images)
    # Memory is that of a way alone: what another way would leave behind is used again, and not counted.
    ways = dict(time=None, parts=['ours']).get(task['measure'], [task['measure']])
    if 'case' in task:
        make = {**benchmark.CASES, **benchmark.MORE}[task['case']]
        variants = make(dtype=dtype, device=DEVICE, **dict(ways=ways) if ways else {})
    else:
        model = Config.fromstring(task['config'], '.py')
        variants = {way: benchmark.TrainingStep(
            model.model if way == 'ours' else {**model.model, 'masker': None}, model.train_dataloader.batch_size, way,
            dtype, DEVICE, model.optim_wrapper) for way in ways or benchmark.WAYS}
    if task['measure'] == 'time':
        return benchmark.measure_time(variants, task['repeats'], synchronise)
    if task['measure'] == 'parts':
        return benchmark.measure_parts(variants['ours'], task['repeats'], synchronise)
    run, = variants.values()
    return benchmark.measure_memory(run)


def measure(**task):
    done = subprocess.run([sys.executable, __file__, '--suite', 'paper', '--child', json.dumps(task)],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{task} failed:\n{done.stderr[-3000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    cpu = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
           if line.startswith('model name')] if Path('/proc/cpuinfo').exists() else [platform.processor()]
    return dict(device=torch.cuda.get_device_name() if DEVICE == 'cuda' else cpu[0], threads=torch.get_num_threads(),
                python=platform.python_version(), torch=torch.__version__, date=date.today().isoformat())


def suite(dtypes: list[str], repeats: int) -> list[dict]:
    """A row a case: of the first of ``dtypes``, and under its name of each other one."""
    rows = []
    for case in benchmark.CASES:
        first, *others = (ratios(case, dtype, repeats) for dtype in dtypes)
        rows.append(dict(name=case, dtype=dtypes[0], repeats=repeats, **first, **dict(zip(dtypes[1:], others))))
    return rows


def ratios(case: str, dtype: str, repeats: int) -> dict:
    task = dict(case=case, dtype=dtype, repeats=repeats)
    seconds = measure(measure='time', **task)
    mib = {way: measure(measure=way, **task) for way in benchmark.WAYS}
    found = dict(time_ratio=seconds['ours'] / seconds['naive'], memory_ratio=mib['ours'] / mib['naive'],
                 seconds=seconds, mib=mib)
    print(f'{case:17} {dtype:8} time {found["time_ratio"]:.2f}x of {1000 * seconds["naive"]:.0f} ms, memory '
          f'{found["memory_ratio"]:.2f}x of {mib["naive"]:.0f} MiB', flush=True)
    return found


def more(repeats: int) -> dict:
    """How much more memory a loss of four times the tokens takes, what masker and hooks add to a step that keeps all,
    and how fast data come."""
    task = dict(dtype='float32', repeats=repeats)
    mib = {case: {way: measure(case=case, measure=way, **task) for way in benchmark.WAYS}
           for case in ('loss-576', 'loss-2304')}
    growth = {way: mib['loss-2304'][way] / mib['loss-576'][way] for way in benchmark.WAYS}
    # A few percent are less than steps differ by: many of them.
    seconds = measure(case='overhead', measure='time', **{**task, 'repeats': 20 * repeats})
    overhead = seconds['ours'] / seconds['naive'] - 1
    reports, interval = measure(case='report', measure='time', **task), DiversityReportHook().interval
    report = reports['ours'] / (interval * reports['naive'])
    print(f'memory of the loss at 4x the tokens: {growth["ours"]:.1f}x, naive {growth["naive"]:.1f}x\n'
          f'masker and hook that keep every token: {overhead:+.1%} of a step\n'
          f'report of diversity every {interval} steps: {report:.2%} of training time')
    with tempfile.TemporaryDirectory() as folder:
        cfg, size = Config.fromfile(config_path(RECIPE)), benchmark.write_photographs(Path(folder), 256)
        cfg.train_dataloader.dataset.data_root = folder
        data = dict(config=RECIPE, kilobytes=size / 1000,
                    rate=measure(measure='rates', config=cfg.pretty_text, dtype='float32')['data'])
    print(f'a worker reads and augments {data["rate"]:.0f} photographs a second')
    return dict(growth=dict(ratio=growth, mib=mib), overhead=dict(ratio=overhead, seconds=seconds),
                report=dict(ratio=report, interval=interval, seconds=reports), data=data)


def main():
    args = parse_args()
    MMLogger.get_current_instance().setLevel('ERROR')
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    if args.suite:
        found = dict(rows=suite([args.dtype] if args.dtype else ['float32', HALF], args.repeats), **more(args.repeats))
    else:
        cfg = Config.fromfile(config_path(args.config))
        try:
            merge_checked(cfg, args.cfg_options)
        except ValueError as error:
            raise SystemExit(f'benchmark.py: {error}') from None
        dtype = args.dtype or (HALF if DEVICE == 'cuda' else 'float32')
        task = dict(config=cfg.pretty_text, dtype=dtype, repeats=args.repeats)
        found = dict(config=args.config, dtype=dtype, batch=cfg.train_dataloader.batch_size,
                     workers=cfg.train_dataloader.num_workers,
                     seconds=measure(measure='parts', **task), naive=measure(measure='time', **task),
                     mib={way: measure(measure=way, **task) for way in benchmark.WAYS},
                     rates=measure(measure='rates', **task), flops=plan(cfg)['flops'])
        tell(found)
    found['machine'] = machine()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + '\n')


def tell(found: dict) -> None:
    step, batch, flops = found['seconds']['step'], found['batch'], found['flops']
    this = flops['this']
    floor = {'student forward': this['student_forward'], 'backward': this['student_backward'],
             **{f'teacher {name}': value for name, value in this['teachers'].items()},
             **{f'loss {name}': value for name, value in this['losses'].items()}, 'step': this['total']}
    print(f'{"":20} {"time":>12} {"":>7} {"GFLOPs an image":>16}')
    for part, seconds in found['seconds'].items():
        counted = f'{floor[part] / 1e9:16.4g}' if part in floor else ''
        print(f'{part:20} {1000 * seconds:9.1f} ms {seconds / step:7.1%} {counted}'.rstrip())
    times, mib, rates = found['naive'], found['mib'], found['rates']
    data = 'not there, not measured'
    if rates['data']:
        data = f'{rates["data"]:.0f} images/s a worker, {rates["data"] * max(found["workers"], 1):.0f} of all'
    # Of whole steps: where parts are timed a GPU is waited for after each.
    rate = batch / times['ours']
    share = this['total'] * rate / rates['matmul']
    print(f'{"throughput":20} {rate:.1f} images/s, {found["dtype"]}; {share:.0%} of the rate of a plain matrix '
          f'product, {rates["matmul"] / 1e9:.4g} GFLOP/s\n'
          f'{"data":20} {data}\n'
          f'{"memory":20} {mib["ours"]:.0f} MiB beyond weights and images\n'
          f'against the naive way: arithmetic {flops["ratio"]:.2f}x of {flops["naive"]["total"] / 1e9:.4g} GFLOPs, '
          f'time {times["ours"] / times["naive"]:.2f}x of {1000 * times["naive"]:.1f} ms, memory '
          f'{mib["ours"] / mib["naive"]:.2f}x of {mib["naive"]:.0f} MiB\n'
          'The backward of a loss counts with the loss, and takes its time with the backward.')


if __name__ == '__main__':
    main()
