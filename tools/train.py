"""Train from a config: pre-training by distillation, or any other OpenMMLab config."""
import argparse
import os

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.compat import config_path
from mmhdistill.engine.config_guard import merge_checked
from mmhdistill.engine.launch import check_batches, leave, prepare
from mmhdistill.engine.manifest import GUARDED


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or mmhdistill::hdistill/NAME.py')
    parser.add_argument('--work-dir', help='where logs and checkpoints go; work_dirs/<config name> by default')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from CHECKPOINT, or from the latest one in the work dir')
    parser.add_argument('--allow-changed', nargs='+', choices=GUARDED, metavar='NAME',
                        help='what a resumed run may have other than its checkpoint: ' + ', '.join(GUARDED))
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument('--amp', action='store_true', help='mixed precision, for configs without it')
    precision.add_argument('--no-amp', action='store_true', help='float32 throughout')
    parser.add_argument('--no-validate', action='store_true', help='no evaluation while training')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate by the images of a step over the config's base_batch_size")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config, for example train_dataloader.batch_size=64')
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
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.allow_changed:
        hooks = cfg.get('default_hooks') or {}
        manifest = dict(hooks.get('manifest') or {}, type='mmhdistill.RunManifest', allow_changed=args.allow_changed)
        cfg.default_hooks = dict(hooks, manifest=manifest)
    auto = 'mmhdistill.auto_amp_optim_wrapper'
    if args.no_amp or args.amp and cfg.optim_wrapper.get('type') != auto:
        cfg.optim_wrapper.type = auto if args.amp else 'OptimWrapper'
        cfg.optim_wrapper.pop('loss_scale', None)
        if args.no_amp or cfg.optim_wrapper.get('dtype') != 'float16':
            cfg.optim_wrapper.pop('dtype', None)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise SystemExit(f'--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=...) in {args.config}')
        cfg.auto_scale_lr.enable = True
        # mmengine counts the images of one forward; a step sees accumulative_counts times as many.
        cfg.auto_scale_lr.base_batch_size /= cfg.optim_wrapper.get('accumulative_counts', 1)
    runner = RUNNERS.build(cfg)
    if cfg.get('resume') and not args.resume:
        runner.logger.warning(f'the config itself says resume=True: training goes on from '
                              f'{cfg.get("load_from") or f"the latest checkpoint in {cfg.work_dir}"}; for a new run, '
                              '--cfg-options resume=False load_from=None')
    try:
        loader = runner.train_loop.dataloader
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    try:
        check_batches(len(loader), len(loader.dataset), cfg.train_dataloader.batch_size)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    try:
        runner.train()
    except SystemExit:  # All processes stop on a signal.
        leave()
        raise
    leave()


if __name__ == '__main__':
    main()
