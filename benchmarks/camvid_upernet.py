"""What a distilled ViT brings to segmentation: UperNet on CamVid, from a student of the quick start and from random
weights, with the same schedule; scores of both on the validation images, as a table."""
import argparse
import time
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.compat import config_path
from mmhdistill.engine.launch import prepare

CONFIG = config_path('mmhdistill::transfer/segmentation/upernet_vit-tiny_96x128_camvid.py')
DEPTH, WIDTH = 4, 64


def settings(start: str, checkpoint: Path, data: Path, iters: int, seed: int) -> dict:
    """Overrides of the config: the quick start's architecture and normalisation, narrow heads, a short schedule."""
    init_cfg = dict(type='Pretrained', checkpoint=f'mmhdistill:{checkpoint}') if start == 'distilled' else None
    folders = {f'{split}_dataloader.dataset.data_root': str(data) for split in ('train', 'val', 'test')}
    return {
        'model.backbone.arch': dict(
            _delete_=True, embed_dims=WIDTH, num_layers=DEPTH, num_heads=4, feedforward_channels=4 * WIDTH),
        'model.backbone.out_indices': tuple(range(DEPTH)),
        'model.backbone.init_cfg': init_cfg,
        'model.neck.embed_dim': WIDTH,
        'model.decode_head.in_channels': [WIDTH] * 4,
        'model.decode_head.channels': 32,
        'model.auxiliary_head.in_channels': WIDTH,
        'model.auxiliary_head.channels': 32,
        'model.data_preprocessor.mean': [120, 120, 120],
        'model.data_preprocessor.std': [60, 60, 60],
        **folders,
        'train_cfg.max_iters': iters,
        'train_cfg.val_interval': iters,
        'param_scheduler.0.end': max(1, iters // 10),
        'param_scheduler.1.begin': max(1, iters // 10),
        'default_hooks.checkpoint.interval': iters,
        'randomness.seed': seed,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', type=Path, help='of a distiller of the quick start: width 64, depth 4')
    parser.add_argument('data', type=Path, help='the folder of CamVid, with img_dir and ann_dir')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/camvid_upernet'), help='where the runs are kept')
    parser.add_argument('--iters', type=int, default=1500, help='iterations of 8 crops')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    folders = {start: args.out / f'{start}-{args.seed}' for start in ('distilled', 'random')}
    for folder in folders.values():
        if folder.exists():
            parser.error(f'{folder} is there already: give another --out, or remove it.')
    rows = []
    for start, folder in folders.items():
        cfg = Config.fromfile(CONFIG)
        cfg.merge_from_dict(settings(start, args.checkpoint, args.data, args.iters, args.seed))
        cfg.experiment_name = f'{start}-{args.seed}'
        prepare(cfg, 'none', str(folder))
        begin = time.process_time()
        runner = Runner.from_cfg(cfg)
        runner.train()
        scores = [runner.message_hub.get_scalar(f'val/{name}').current() for name in ('mIoU', 'mAcc', 'aAcc')]
        rows.append((start, *scores, (time.process_time() - begin) / 60))
    print(f'\n{args.iters} iterations, seed {args.seed}\n')
    print('| backbone starts from | mIoU % | mean class accuracy % | pixel accuracy % | CPU minutes |')
    print('|---|---:|---:|---:|---:|')
    for start, miou, macc, aacc, minutes in rows:
        print(f'| {start} weights | {miou:.2f} | {macc:.2f} | {aacc:.2f} | {minutes:.1f} |')


if __name__ == '__main__':
    main()
