"""Run a grid of configs one after the other, each with several seeds, and compare them in one table and one figure."""
import argparse
from pathlib import Path

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis.ablation import as_markdown, run_grid, write


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('grid', help='a config with config, seeds and cells, see configs/ablations')
    parser.add_argument('--out', type=Path,
                        help='folder of runs; ablations/<name of the grid> by default; what has finished is '
                        'not run again')
    parser.add_argument('--gpus', type=int, default=0, metavar='N',
                        help='train every run with tools/dist_train.sh on N GPUs')
    args = parser.parse_args()
    out = args.out or Path('ablations') / Path(args.grid).stem
    try:
        rows = run_grid(args.grid, out, args.gpus)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise SystemExit(f'{parser.prog}: {error}') from None
    write(rows, out)
    print(f'\n{as_markdown(rows)}\n{out}/table.md, table.csv, figure.png')


if __name__ == '__main__':
    main()
