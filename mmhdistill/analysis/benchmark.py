"""Time and memory of the relation loss and of whole steps, as ratios to the naive way (:mod:`.naive`) in one run."""
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper

from ..engine.hooks import DiversityReportHook, RedundantTokenMasker
from ..functional import relation_kl
from ..registry import DATASETS, MODELS
from .naive import naive_losses, naive_relation_kl

# Name -> what is run once: forward, backward and, of a step, the optimizer.
Variants = dict[str, Callable[[], object]]
WAYS = ('naive', 'ours')
_IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])


def loss_variants(batch: int, tokens: int, heads: int = 12, width: int = 64, rows: int | None = None,
                  dtype: torch.dtype = torch.float32, device: str = 'cpu', ways: Sequence[str] = WAYS) -> Variants:
    """The relation loss of one layer, forward and backward, of heads that are ``width`` wide; ours by ``rows``."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, batch, tokens, heads * width, dtype=dtype, device=device).unbind()
    student.requires_grad_()

    def run(function: Callable) -> torch.Tensor:
        student.grad = None
        function(*student, *teacher, heads=heads).backward()
        return student.grad

    losses = dict(naive=naive_relation_kl, ours=partial(relation_kl, rows=rows))
    return {way: partial(run, losses[way]) for way in ways}


def small_distiller(masker: dict | None, masked_teacher: bool = False) -> dict:
    """ViT-S/16 of 224 px taught by two of its like, of random weights: features of one, relations of the other."""
    card = dict(embed_dims=384, depth=12, num_heads=6, patch_size=16, **_IMAGENET)
    arch = dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536)
    teacher = dict(type='mmhdistill.ViTTeacher', checkpoint=None)
    return dict(
        type='mmhdistill.HybridDistiller',
        data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **_IMAGENET),
        backbone=dict(type='mmhdistill.MaskableVisionTransformer', arch=arch, img_size=224, patch_size=16),
        teachers=dict(cl=dict(teacher, card=dict(name='cl', **card)),
                      mim=dict(teacher, card=dict(name='mim', **card), masked=masked_teacher)),
        masker=masker,
        losses=dict(feature=dict(type='mmhdistill.FeatureLoss', teacher='cl'),
                    relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mim')))


def step_variants(masker: dict | None, masked_teacher: bool = False, batch: int = 8,
                  dtype: torch.dtype = torch.float32, device: str = 'cpu', ways: Sequence[str] = WAYS) -> Variants:
    """A whole step of :func:`small_distiller`; the naive way masks nothing. ``dtype`` is autocast's."""
    models = dict(naive=small_distiller(None), ours=small_distiller(masker, masked_teacher))
    return {way: TrainingStep(models[way], batch, way, dtype, device) for way in ways}


def overhead_variants(batch: int = 1, dtype: torch.dtype = torch.float32, device: str = 'cpu') -> Variants:
    """``naive``, a step without a masker, and ``ours``, one with a masker and its hook that keep every token.

    Of one image: what they add does not grow with the batch, and a step does.
    """
    plain = TrainingStep(small_distiller(None), batch, 'ours', dtype, device)
    masked = TrainingStep(small_distiller(dict(INPUT, keep_rate=1.0, teacher='mim')), batch, 'ours', dtype, device)
    hook = RedundantTokenMasker()
    runner = SimpleNamespace(model=masked.distiller, message_hub=MessageHub.get_instance('benchmark'),
                             train_dataloader=[None], iter=0, max_iters=1)
    hook.before_train(runner)

    def step() -> None:
        hook.before_train_iter(runner, 0)
        masked()
        hook.after_train_iter(runner, 0)

    return dict(naive=plain, ours=step)


def report_variants(batch: int = 8, dtype: torch.dtype = torch.float32, device: str = 'cpu') -> Variants:
    """``naive``, a step, and ``ours``, a report of :class:`DiversityReportHook` on its images, teachers measured."""
    step = TrainingStep(small_distiller(None), batch, 'ours', dtype, device)
    hook = DiversityReportHook()
    runner = SimpleNamespace(model=step.distiller, visualizer=SimpleNamespace(add_scalars=lambda *args, **kwargs: None))
    hook._images, hook._teachers = step.images, None
    return dict(naive=step, ours=partial(hook._report, runner, 0))


class TrainingStep:
    """What trains ``model`` by one step on random images: as the distiller does, or the naive way.

    Args:
        model: config of a distiller; its teachers are of random weights.
        dtype: of autocast; float32 is none.
    """

    def __init__(self, model: dict, batch: int, way: str = 'ours', dtype: torch.dtype = torch.float32,
                 device: str = 'cpu', optimizer: dict | None = None):
        torch.manual_seed(0)
        teachers = {name: {**cfg, 'checkpoint': None} for name, cfg in model['teachers'].items() if cfg}
        self.distiller = MODELS.build({**model, 'teachers': teachers})
        self.distiller.init_weights()
        self.distiller.train().to(device)
        self.wrapper = build_optim_wrapper(self.distiller, optimizer or dict(optimizer=dict(type='AdamW', lr=1e-4)))
        self.images = torch.randn(batch, 3, *self.distiller.backbone.img_size, device=device)
        self._losses = self.distiller.loss if way == 'ours' else partial(naive_losses, self.distiller)
        self._autocast = partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)

    def __call__(self) -> None:
        with self._autocast():
            losses = self._losses(self.images)
        self.wrapper.update_params(sum(losses.values()))


def measure_parts(step: TrainingStep, repeats: int, synchronise: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Median seconds of each part of ``step``, and of the ``step`` as a whole."""
    spent: dict[str, list[float]] = {}

    def clock(owner, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            synchronise()
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            synchronise()
            spent.setdefault(part, []).append(time.perf_counter() - start)
            return result

        setattr(owner, method, timed)

    distiller = step.distiller
    for name, teacher in distiller.teachers.items():
        clock(teacher, 'forward', f'teacher {name}')
    for name, loss in distiller.losses.items():
        clock(loss, 'forward', f'loss {name}')
    if distiller.masker is not None:
        clock(distiller.masker, 'reducer', 'masker')
    clock(distiller.backbone, 'encode', 'student forward')
    clock(step.wrapper, 'backward', 'backward')
    clock(step.wrapper, 'step', 'optimizer')
    whole = measure_time(dict(step=step), repeats, synchronise)
    return {**{part: median(seconds[1:]) for part, seconds in spent.items()}, **whole}


INPUT = dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.7)
# Case -> what makes its variants; the names are those of the JSON file.
CASES: dict[str, Callable[..., Variants]] = {
    'loss-197': partial(loss_variants, 16, 197),
    'loss-2305': partial(loss_variants, 1, 2305),
    'step-masked': partial(step_variants, dict(INPUT, teacher='mim')),
    'step-masked-kept': partial(step_variants, dict(INPUT, teacher='cl'), True),
    'step-unmasked': partial(step_variants, None),
}


# Beside those of the table: memory of the loss when tokens grow fourfold, at blocks of equally many rows, what masking
# costs where it saves nothing, and a report of diversity.
MORE: dict[str, Callable[..., Variants]] = {
    'loss-576': partial(loss_variants, 1, 576, rows=64),
    'loss-2304': partial(loss_variants, 1, 2304, rows=64),
    'overhead': overhead_variants,
    'report': report_variants,
}


def matmul_rate(dtype: torch.dtype = torch.float32, device: str = 'cpu', side: int = 2048, repeats: int = 5,
                synchronise: Callable[[], None] = lambda: None) -> float:
    """Multiplications and additions a second in the product of two square matrices: what the device can reach."""
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)
    return 2 * side**3 / measure_time(dict(product=lambda: a @ b), repeats, synchronise)['product']


def data_rate(dataset: dict, count: int = 256) -> float | None:
    """Images a second that one worker reads and augments; None where the data are not there."""
    if not Path(dataset.get('data_root') or '.').exists():
        return None
    built = DATASETS.build(dataset)
    indices = [index * len(built) // count for index in range(min(count, len(built)))]
    built[0]
    start = time.perf_counter()
    for index in indices:
        built[index]
    return len(indices) / (time.perf_counter() - start)


def write_photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> float:
    """``count`` different JPEG files as large as ImageNet's are on average, in pixels and, about, in bytes.

    Returns:
        Mean bytes of a file.
    """
    rng, total = np.random.default_rng(0), 0
    for index in range(count):
        coarse = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC)
        image = np.clip(coarse + rng.normal(0, 22, coarse.shape), 0, 255).astype(np.uint8)
        path = folder / f'{index:04}.jpg'
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        total += path.stat().st_size
    return total / count


def measure_time(variants: Variants, repeats: int, synchronise: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Median seconds of each, one after the other in turn, after one run that does not count."""
    taken = {name: [] for name in variants}
    for index in range(repeats + 1):
        for name, run in variants.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if index:
                taken[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def measure_memory(run: Callable[[], object], steps: int = 3) -> float:
    """MiB of ``steps`` runs at their peak beyond what was there before. For a process of its own: a peak never falls.

    Resident memory of the process, or what is allocated on the GPU where there is one.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident('VmRSS')
    for _ in range(steps):
        run()
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return resident('VmHWM') - before


def resident(field: str) -> float:
    """MiB of this process that are in memory, ``VmRSS``, or were at their peak, ``VmHWM``, as Linux tells.

    The peak of ``getrusage`` will not do: a process that is started begins with that of the one that starts it.
    """
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f'{field}:'))
