"""How long a run is: images, steps, keep rates over training, files that it writes."""
from pathlib import Path

from mmengine.config import Config

from ..engine.hooks.redundant_token_masker import RedundantTokenMasker, masker_of
from ..engine.launch import check_batches
from ..functional import ramp
from ..models import HybridDistiller
from ..registry import DATASETS, HOOKS

# Images of the training sets of the recipes, as published.
KNOWN_IMAGES = {
    'data/imagenet/train': (1_281_167, 'ImageNet-1K'),
    'data/imagenet21k': (14_197_122, 'ImageNet-21K, its full release'),
    'data/cifar10/train': (50_000, 'CIFAR-10'),
}
# Measured on a run of the quick start's distiller: a logged iteration in the text log and mmengine's two JSON logs, and
# any iteration in the history of the log that a checkpoint carries, of at most a million.
_LOGGED, _HISTORY, _HISTORY_LENGTH = 812, 166, 1_000_000


def length(cfg: Config, gpus: int | None, images: int | None, auto_scale_lr: bool) -> tuple[dict, list[str]]:
    """Batches, steps and epochs, and what should be noted about them. What is not known without the data is None.

    Raises:
        ValueError: images that make no batch, and a batch that cannot be split over ``gpus``.
    """
    batch = cfg.train_dataloader.batch_size
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    if auto_scale_lr and not base:
        raise ValueError(f'--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=...) in {cfg.filename}')
    if gpus is None:
        gpus = base // (batch * accumulated) if base and base % (batch * accumulated) == 0 else 1
    elif base and base % gpus and not auto_scale_lr:
        raise ValueError(f'the learning rate is made for {base} images a step, which cannot be split over {gpus} GPUs '
                         f'equally: take a number of GPUs that divides {base}, or train with --auto-scale-lr (and give '
                         'it here too).')
    total, rate = gpus * batch * accumulated, (cfg.optim_wrapper.get('optimizer') or {}).get('lr')
    notes = []
    if auto_scale_lr and rate is not None:
        rate *= total / base
    elif base and total != base:
        notes.append(f'{total} images make a step, and the learning rate is made for {base}: set '
                     'train_dataloader.batch_size or optim_wrapper.accumulative_counts, or train with --auto-scale-lr')
    images, source = _images(cfg.train_dataloader.dataset, images)
    per_epoch = None
    if images is not None:
        # The sampler gives every process equally many, some twice if need be.
        share = -(-images // gpus)
        per_epoch = share // batch if cfg.train_dataloader.get('drop_last') else -(-share // batch)
        check_batches(per_epoch, images, batch)
    epochs, iterations = cfg.train_cfg.get('max_epochs'), cfg.train_cfg.get('max_iters')
    if epochs is None:
        epochs = iterations / per_epoch if per_epoch else None
    elif per_epoch:
        iterations = epochs * per_epoch
    return dict(gpus=gpus, batch=batch, accumulated=accumulated, images_per_step=total, lr=rate, images=images,
                images_source=source, iterations_per_epoch=per_epoch, epochs=epochs, iterations=iterations), notes


def _images(dataset: dict, given: int | None) -> tuple[int | None, str]:
    """Images in an epoch, and how that is known."""
    root = dataset.get('data_root')
    if given is not None:
        if given < 1:
            raise ValueError(f'--images is {given}: give the number of images in an epoch.')
        return given, 'given'
    if root is None or Path(root).exists():
        return len(DATASETS.build(dataset)), f'counted in {root}' if root else 'counted'
    if root in KNOWN_IMAGES:
        number, name = KNOWN_IMAGES[root]
        return number, f'{name} as published; {root} is not there'
    return None, f'{root} is not there: give --images'


def keep_rates(cfg: Config, distiller: HybridDistiller, run: dict, moments: int = 101) -> list[float]:
    """Keep rates of the masker at equally spaced moments of training, or the one rate of all training.

    Raises:
        ValueError: a hook that moves the rate of a masker that is not there, or a rate out of (0, 1].
    """
    rates = [distiller.masker.keep_rate] if distiller.masker else [1.0]
    for settings in cfg.get('custom_hooks') or []:
        kind = settings['type']
        if (HOOKS.get(kind) if isinstance(kind, str) else kind) is not RedundantTokenMasker:
            continue
        hook, own = HOOKS.build(settings), masker_of(distiller).keep_rate
        last, end = hook.keep_rate or own, run['epochs' if hook.by_epoch else 'iterations']
        rates = [last]
        if hook.schedule != 'constant' and end is not None:
            first, over = hook.begin, end if hook.end is None else hook.end
            now = (end * moment / (moments - 1) for moment in range(moments))
            rates = [ramp((x - first) / max(over - first, 1e-9), hook.start, last, hook.schedule) for x in now]
    return rates


def files(cfg: Config, run: dict, checkpoint: int) -> dict:
    """What the run writes: checkpoints, of ``checkpoint`` bytes and the history of the log, and logs."""
    hooks, iterations, per_epoch = cfg.get('default_hooks') or {}, run['iterations'], run['iterations_per_epoch']
    hook = hooks.get('checkpoint', dict(interval=1))
    kept = _kept(hook, run['epochs' if hook.get('by_epoch', True) else 'iterations']) if hook else 0
    every = (hooks.get('logger') or {}).get('interval', 10)
    # An epoch that is shorter than the interval is logged once, at its end.
    logged = iterations and (iterations / per_epoch * max(per_epoch // every, 1) if per_epoch else iterations // every)
    return dict(checkpoint=checkpoint + _HISTORY * min(iterations or 0, _HISTORY_LENGTH), checkpoints=kept,
                logs=logged and round(logged * _LOGGED))


def _kept(hook: dict, end: float | None) -> int | None:
    """Checkpoints that are left at the end of training, in the unit of ``hook``; None where all are kept and ``end`` is
    not known."""
    interval, most = hook.get('interval', -1), hook.get('max_keep_ckpts', -1)
    if end is None:
        return most if most > 0 else None
    regular = int(end) // interval if interval > 0 else 0
    written = regular + (hook.get('save_last', True) and regular * interval != int(end))
    return min(written, most) if most > 0 else written
