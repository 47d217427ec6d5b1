"""Run a recorded training step again, whose loss or gradients were not finite, and print its layers."""
import argparse
import json
import tempfile
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.compat import config_path
from mmhdistill.engine.config_guard import merge_checked
from mmhdistill.engine.launch import prepare
from mmhdistill.engine.replay import as_table, replay


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='of the run: the copy in its work dir')
    parser.add_argument('record', type=Path, help='work_dir/nonfinite/iter_N_rank_R.json')
    parser.add_argument('--checkpoint', help="of the state before the step; the record's own by default")
    parser.add_argument('--no-amp', action='store_true', help='in float32: does it come from the precision?')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config')
    return parser.parse_args()


def main():
    args = parse_args()
    record = json.loads(args.record.read_text())
    checkpoint = args.checkpoint or record['checkpoint'] and str(args.record.with_name(record['checkpoint']))
    if not checkpoint or not Path(checkpoint).is_file():
        raise SystemExit(f'{args.record} has no checkpoint beside it: there is one of the first step of the last row. '
                         'Replay that record, or give --checkpoint, one written after '
                         f'{record["iteration"]} iterations.')
    cfg = Config.fromfile(config_path(args.config))
    try:
        merge_checked(cfg, args.cfg_options)
    except ValueError as error:
        raise SystemExit(f'{args.config}: {error}') from None
    if args.no_amp:
        cfg.optim_wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype'):
            cfg.optim_wrapper.pop(key, None)
    with tempfile.TemporaryDirectory() as folder:  # for what a Runner leaves
        prepare(cfg, 'none', folder)
        cfg.resume, cfg.load_from = True, checkpoint
        found = replay(RUNNERS.build(cfg), record)
    print(f'iteration {record["iteration"] + 1}, process {record["rank"]}, samples '
          f'{[index for index, _ in record["samples"]]}')
    for name, value in found['losses'].items():
        print(f'{name}: {value:.6g} (recorded: {record["losses"][name]:.6g})')
    print(as_table(found['layers']))
    print('gradients that are not finite: ' + (', '.join(found['gradients']) or 'none'))


if __name__ == '__main__':
    main()
