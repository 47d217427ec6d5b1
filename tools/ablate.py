"""Run a grid of configs, each with several seeds, and compare them in one table and one figure."""
import argparse
from pathlib import Path

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis.ablation import as_markdown, heed_signals, run_grid, write


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('grid', help='a config with config, seeds and cells, or mmhdistill::ablations/NAME.py')
    parser.add_argument('--out', type=Path,
                        help='folder of runs; ablations/<name of the grid> by default; what has finished is '
                        'not run again')
    parser.add_argument('--gpus', type=int, default=0, metavar='N',
                        help='train every run with tools/dist_train.sh on N GPUs')
    parser.add_argument('--jobs', type=int, default=1, metavar='N',
                        help='runs at a time, each with its share of the cores or with GPUs of its own; 1 by default')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs is {args.jobs}: give the number of runs at a time, at least 1')
    out = args.out or Path('ablations') / Path(args.grid).stem
    heed_signals()
    try:
        rows = run_grid(args.grid, out, args.gpus, args.jobs)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f'{parser.prog}: {error}') from None
    except KeyboardInterrupt:
        raise SystemExit(f'{parser.prog}: interrupted; the same command goes on from here') from None
    write(rows, out)
    print(f'\n{as_markdown(rows)}\n{out}/table.md, table.csv, figure.png')
    if failed := [row for row in rows if 'failed' in row]:
        raise SystemExit(f'{parser.prog}: {len(failed)} of {len(rows)} runs failed; the same command tries them again' +
                         ''.join(f"\ncell '{row['cell']}', seed {row['seed']}: {row['failed']}" for row in failed))


if __name__ == '__main__':
    main()
