"""What the command-line tools share."""
import os.path as osp

import torch
from mmengine.config import Config


def prepare(cfg: Config, launcher: str, work_dir: str | None) -> None:
    """Put the launcher and the work folder (``work_dirs/<config name>`` by default) into ``cfg``.

    Without a GPU, processes talk over gloo. mmengine's own initialisation asks for a CUDA device in any case, so on CPU
    the process group is made here.
    """
    cfg.launcher = launcher
    _check_schedule(cfg)
    name = osp.splitext(osp.basename(cfg.filename))[0]
    cfg.work_dir = work_dir or cfg.get('work_dir') or osp.join('work_dirs', name)
    if launcher == 'none' or torch.cuda.is_available():
        return
    if launcher != 'pytorch':
        raise ValueError(f"launcher '{launcher}' needs GPUs, and none is visible: use tools/dist_train.sh on CPU.")
    torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False,
                   find_unused_parameters=cfg.get('find_unused_parameters', False))
    cfg.model_wrapper_cfg = {**wrapper, **(cfg.get('model_wrapper_cfg') or {}), 'device_ids': None}


def _check_schedule(cfg: Config) -> None:
    """A shortened run may end before a part of the schedule begins, of which mmengine says only 'begin' and 'end'."""
    schedulers, epochs = cfg.get('param_scheduler'), (cfg.get('train_cfg') or {}).get('max_epochs')
    if not isinstance(schedulers, list) or epochs is None:
        return
    for scheduler in schedulers:
        if scheduler.get('by_epoch', True) and scheduler.get('begin', 0) >= epochs:
            raise ValueError(f'{scheduler.type} of param_scheduler begins at epoch {scheduler.begin}, but training '
                             f'ends after {epochs}: shorten the warm-up too (the end of one scheduler and the begin of '
                             'the next), or, to try things out, train at a constant learning rate: --cfg-options '
                             'param_scheduler=None')
