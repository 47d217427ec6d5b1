"""Test a checkpoint. For a distiller: features of the student, then weighted k-NN accuracy."""
import argparse
import os

from mmengine.config import Config, DictAction
from mmengine.fileio import dump
from mmengine.registry import RUNNERS

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.compat import config_path
from mmhdistill.engine.config_guard import merge_checked
from mmhdistill.engine.launch import FittingCheckpoint, leave, prepare


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or mmhdistill::hdistill/NAME.py')
    parser.add_argument('checkpoint', help='path of a checkpoint')
    parser.add_argument('--work-dir', help='where the log goes; <work dir of the config>/test by default')
    parser.add_argument('--out', metavar='FILE.json', help='write the metrics to a file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main():
    args = parse_args()
    cfg = Config.fromfile(config_path(args.config))
    try:
        merge_checked(cfg, args.cfg_options)
    except ValueError as error:
        raise SystemExit(f'{args.config}: {error}') from None
    prepare(cfg, args.launcher, args.work_dir)
    if args.work_dir is None:
        # The Runner writes its config there, which would replace that of the training.
        cfg.work_dir = os.path.join(cfg.work_dir, 'test')
    if cfg.get('test_dataloader') is None:
        raise SystemExit(f'{args.config} has no test_dataloader: add one with test_cfg and test_evaluator.')
    # The copy that a resumed run leaves says resume=True.
    cfg.resume, cfg.load_from = False, args.checkpoint
    runner = RUNNERS.build(cfg)
    runner.register_hook(FittingCheckpoint())
    metrics = runner.test()
    if args.out and int(os.environ.get('RANK', 0)) == 0:
        dump(metrics, args.out)
    leave()


if __name__ == '__main__':
    main()
