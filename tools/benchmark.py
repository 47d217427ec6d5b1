"""What a step of distillation costs, by part and as a ratio to the naive way, on this machine.

The naive way keeps eager attention maps and N x N relations for backward, masks nothing and runs teachers to their end;
both ways are measured in turn in one run. Data are random images, teachers have random weights.
"""
import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis import benchmark
from mmhdistill.analysis.plan import plan
from mmhdistill.compat import config_path
from mmhdistill.engine import DiversityReportHook

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('config', nargs='?', help='of a distiller: its step by part, and the naive one')
    what.add_argument('--suite', choices=['paper'], help='the cases of docs/benchmarks.md')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config, for example train_dataloader.batch_size=64')
    parser.add_argument('--dtype', choices=list(DTYPES),
                        help='float32, or autocast to bfloat16; of a config float32 on CPU and bfloat16 on GPU by '
                        'default, of the suite both')
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
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            images = benchmark.data_rate(cfg.train_dataloader.dataset)
        return dict(matmul=benchmark.matmul_rate(dtype, DEVICE, synchronise=synchronise), data=images)
    if 'case' in task:
        variants = {**benchmark.CASES, **benchmark.MORE}[task['case']](dtype=dtype, device=DEVICE)
    else:
        model = Config.fromstring(task['config'], '.py')
        variants = {way: benchmark.TrainingStep(
            model.model if way == 'ours' else {**model.model, 'masker': None}, model.train_dataloader.batch_size, way,
            dtype, DEVICE, model.optim_wrapper) for way in task.get('ways', ['naive', 'ours'])}
    if task['measure'] == 'time':
        return benchmark.measure_time(variants, task['repeats'], synchronise)
    if task['measure'] == 'parts':
        return benchmark.measure_parts(variants['ours'], task['repeats'], synchronise)
    run = variants.pop(task['measure'])
    variants.clear()
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
    rows = []
    for dtype in dtypes:
        for case in benchmark.CASES:
            task = dict(case=case, dtype=dtype, repeats=repeats)
            seconds = measure(measure='time', **task)
            mib = {way: measure(measure=way, **task) for way in ('naive', 'ours')}
            rows.append(dict(
                name=case, dtype=dtype, time_ratio=seconds['ours'] / seconds['naive'],
                memory_ratio=mib['ours'] / mib['naive'], seconds=seconds, mib=mib, repeats=repeats))
            print(f'{case:17} {dtype:8} time {rows[-1]["time_ratio"]:.2f}x of {1000 * seconds["naive"]:.0f} ms, memory '
                  f'{rows[-1]["memory_ratio"]:.2f}x of {mib["naive"]:.0f} MiB', flush=True)
    return rows


def more(repeats: int) -> dict:
    """How much more memory a loss of four times the tokens takes, and what masker and hooks add to a step of all."""
    task = dict(dtype='float32', repeats=repeats)
    mib = {case: {way: measure(case=case, measure=way, **task) for way in ('naive', 'ours')}
           for case in ('loss-576', 'loss-2304')}
    growth = {way: mib['loss-2304'][way] / mib['loss-576'][way] for way in ('naive', 'ours')}
    # A few percent are less than steps differ by: many of them.
    seconds = measure(case='overhead', measure='time', **{**task, 'repeats': 20 * repeats})
    overhead = seconds['ours'] / seconds['naive'] - 1
    reports, interval = measure(case='report', measure='time', **task), DiversityReportHook().interval
    report = reports['ours'] / (interval * reports['naive'])
    print(f'memory of the loss at 4x the tokens: {growth["ours"]:.1f}x, naive {growth["naive"]:.1f}x\n'
          f'masker and hook that keep every token: {overhead:+.1%} of a step\n'
          f'report of diversity every {interval} steps: {report:.2%} of training time')
    return dict(growth=dict(ratio=growth, mib=mib), overhead=dict(ratio=overhead, seconds=seconds),
                report=dict(ratio=report, interval=interval, seconds=reports))


def main():
    args = parse_args()
    MMLogger.get_current_instance().setLevel('ERROR')
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    if args.suite:
        found = dict(rows=suite([args.dtype] if args.dtype else list(DTYPES), args.repeats), **more(args.repeats))
    else:
        cfg = Config.fromfile(config_path(args.config))
        cfg.merge_from_dict(args.cfg_options or {})
        dtype = args.dtype or ('bfloat16' if DEVICE == 'cuda' else 'float32')
        task = dict(config=cfg.pretty_text, dtype=dtype, repeats=args.repeats)
        found = dict(config=args.config, dtype=dtype, batch=cfg.train_dataloader.batch_size,
                     seconds=measure(measure='parts', ways=['ours'], **task), naive=measure(measure='time', **task),
                     mib={way: measure(measure=way, ways=[way], **task) for way in ('naive', 'ours')},
                     rates=measure(measure='rates', **task), flops=plan(cfg)['flops'])
        tell(found)
    found['machine'] = machine()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + '\n')


def tell(found: dict) -> None:
    step, batch = found['seconds']['step'], found['batch']
    for part, seconds in found['seconds'].items():
        if part != 'step':
            print(f'{part:20} {1000 * seconds:9.1f} ms  {seconds / step:6.1%}')
    times, mib, flops, rates = found['naive'], found['mib'], found['flops'], found['rates']
    share = flops['this']['total'] * batch / step / rates['matmul']
    data = f'{rates["data"]:.0f} images/s a worker' if rates['data'] else 'not there, not measured'
    print(f'{"step":20} {1000 * step:9.1f} ms  {batch / step:.1f} images/s, {found["dtype"]}\n'
          f'{"data":20} {data}\n'
          f'{"arithmetic":20} {flops["this"]["total"] / 1e9:.3g} GFLOPs an image, at {share:.0%} of the rate of a '
          f'plain matrix product, {rates["matmul"] / 1e9:.4g} GFLOP/s\n'
          f'against the naive way: arithmetic {flops["ratio"]:.2f}x, time {times["ours"] / times["naive"]:.2f}x of '
          f'{1000 * times["naive"]:.1f} ms, memory {mib["ours"] / mib["naive"]:.2f}x of {mib["naive"]:.0f} MiB')


if __name__ == '__main__':
    main()
