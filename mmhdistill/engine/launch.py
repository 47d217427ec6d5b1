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
    name = osp.splitext(osp.basename(cfg.filename))[0]
    cfg.work_dir = work_dir or cfg.get('work_dir') or osp.join('work_dirs', name)
    if launcher == 'none' or torch.cuda.is_available():
        return
    if launcher != 'pytorch':
        raise ValueError(f"launcher '{launcher}' needs GPUs, and none is visible: use tools/dist_train.sh on CPU.")
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
