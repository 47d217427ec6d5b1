"""What the command-line tools share."""
import os
import os.path as osp
import time
from collections.abc import Iterable

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner


def prepare(cfg: Config, launcher: str, work_dir: str | None) -> None:
    """Put the launcher and the work folder (``work_dirs/<config name>`` by default) into ``cfg``.

    Without a GPU, processes talk over gloo. mmengine's own initialisation asks for a CUDA device in any case, so on CPU
    the process group is made here. Of mpirun's processes mmengine does not tell its DDP which GPU they have.
    """
    cfg.launcher = launcher
    if (cfg.get('randomness') or {}).get('deterministic'):
        # What PyTorch asks for before it multiplies matrices on a GPU.
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if launcher == 'mpi' and 'OMPI_COMM_WORLD_LOCAL_RANK' in os.environ:
        os.environ['LOCAL_RANK'] = os.environ['OMPI_COMM_WORLD_LOCAL_RANK']
    check_schedule(cfg)
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


def leave() -> None:
    """Leave the other processes in good order, at the end of a tool.

    Else threads of the process group outlive the interpreter that they need, and the process may abort or hang.
    """
    if not torch.distributed.is_initialized():
        return
    gloo = 'gloo' in torch.distributed.get_backend()
    torch.distributed.destroy_process_group()
    if gloo:
        # Something in DDP keeps gloo's threads alive all the same. One that still holds a tensor of the last collective
        # asks the interpreter to free it, and aborts the process if that is ending: on a busy machine it needs time.
        time.sleep(1)


def check_schedule(cfg: Config) -> None:
    """A shortened run may end before a part of the schedule begins, of which mmengine says only 'begin' and 'end'."""
    schedulers, training = cfg.get('param_scheduler'), cfg.get('train_cfg') or {}
    for scheduler in schedulers if isinstance(schedulers, list) else []:
        unit = 'epoch' if scheduler.get('by_epoch', True) else 'iteration'
        end, begin = training.get(dict(epoch='max_epochs', iteration='max_iters')[unit]), scheduler.get('begin', 0)
        if end is not None and begin >= end:
            raise ValueError(f'{scheduler.type} of param_scheduler begins at {unit} {begin}, but training ends after '
                             f'{end}: shorten the warm-up too (the end of one scheduler and the begin of the next), '
                             'or, to try things out, train at a constant learning rate: --cfg-options '
                             'param_scheduler=None')


def check_batches(batches: int, images: int, batch: int) -> None:
    """Raise ValueError unless an epoch of ``images`` has ``batches`` for every process."""
    if not batches:
        raise ValueError(f'{images} images make no full batch of {batch} for every process (drop_last=True): set '
                         'train_dataloader.batch_size to a smaller one')


class FittingCheckpoint(Hook):
    """Refuses a checkpoint that lacks tensors of the model: mmengine warns, and goes on with random weights."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights, ours = checkpoint.get('state_dict', checkpoint), model.state_dict()
        theirs = {name.removeprefix('module.'): x for name, x in weights.items()}
        if not theirs.keys() & ours.keys():
            raise ValueError(f'no tensor of the checkpoint ({_some(theirs)}) is one of {type(model).__name__} '
                             f'({_some(ours)}): give the checkpoint of a model that the config can hold, for a student '
                             'the checkpoint of its distiller.')
        # A distiller is tested by its student alone.
        missing = [name for name in ours if name not in theirs and not name.startswith('losses.')]
        # Positions are resampled to another image size.
        wrong = [f'{name}: {tuple(theirs[name].shape)} there, {tuple(x.shape)} here' for name, x in ours.items()
                 if name in theirs and theirs[name].shape != x.shape
                 and not (name.endswith('pos_embed') and theirs[name].shape[-1] == x.shape[-1])]
        if missing or wrong:
            raise ValueError(f'the checkpoint does not fit {type(model).__name__}: it lacks {len(missing)} tensors '
                             f'({_some(missing) or "none"}), and {len(wrong)} have another shape '
                             f'({_some(wrong) or "none"}). Give the config the arch and patch_size that were trained.')


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ', '.join(names[:3] + ['...'] * (len(names) > 3))
