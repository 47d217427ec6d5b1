"""What a run of a distiller will do and cost, from its config: no weights, no data, no GPU."""
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..engine.launch import check_schedule
from ..models import HybridDistiller, MaskedFeatureLoss
from ..models.teachers.fetch import cache_dir, cached_name
from .plan_time import files, keep_rates, length
from .rehearsal import Rehearsal, Step, build_on_meta

# Of each GPU [choice]: a third of the 312 TFLOP/s of bfloat16 in the data sheet of the A100.
TFLOPS = 100.0
NOT_THERE = ', not there yet'
_HALF = ('auto_amp_optim_wrapper', 'BFloat16OptimWrapper', 'AmpOptimWrapper', 'ApexOptimWrapper')
_SETTINGS = ('distance', 'kinds', 'relation_heads', 'temperature', 'include_extra', 'include_cls', 'normalize_target')


def plan(cfg: Config, gpus: int | None = None, tflops: float = TFLOPS, images: int | None = None,
         auto_scale_lr: bool = False) -> dict:
    """The facts of a run, in JSON types: ``student``, ``teachers``, ``masker`` and ``losses`` (what is aligned with
    what), ``parameters``, ``flops`` of an image, ``memory`` in bytes of a GPU, ``time``, ``disk`` and ``notes``.

    Args:
        cfg: of a distiller. Its files need not be there.
        gpus: by default as many as make the batch that the learning rate is made for.
        tflops: TFLOP/s that each GPU achieves.
        images: in an epoch; by default counted in the folder of the data, or as published for the recipes' data sets.
        auto_scale_lr: as ``tools/train.py --auto-scale-lr``.

    Raises:
        ValueError: what building the model, or its first step, would refuse, in the same words; another kind of config.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        check_schedule(cfg)
        distiller = build_on_meta(cfg)
        distiller.backbone.check_start()
        run, notes = length(cfg, gpus, images, auto_scale_lr)
        rates = keep_rates(cfg, distiller, run)
        size, note = _image_size(cfg, distiller)
        states = _optimizer_states(cfg, distiller)
    notes += [note] if note else []
    normalisation = {name: getattr(distiller.data_preprocessor, name).flatten().tolist()
                     for name in ('mean', 'std')}
    half = cfg.optim_wrapper.get('type', 'OptimWrapper').split('.')[-1] in _HALF
    rehearsal = Rehearsal(distiller, size, half)
    # While the keep rate falls, memory is needed for the most tokens that are ever kept.
    _keep(distiller, max(rates))
    most, grid = rehearsal.step(), tuple(side // distiller.backbone.spec.patch_size for side in size)
    memory = _memory(cfg, distiller, grid, most, states, run, half)
    _keep(distiller, rates[-1])
    step = rehearsal.step() if min(rates) < max(rates) else most
    flops = _flops(distiller, grid, rates, step, rehearsal.unmasked_loss_flops())
    teachers = _teachers(cfg, distiller, grid, size)
    if idle := [name for name, settings in cfg.model.teachers.items() if settings and name not in teachers]:
        notes.append(f'no loss reads teachers {idle}: they are neither built, loaded nor run')
    student = _student(cfg, distiller, image_size=list(size), grid=list(grid), **normalisation)
    speed = tflops * 1e12 / flops['this']['total']
    run.update(tflops=tflops, images_per_second=speed,
               seconds=run['iterations'] and run['iterations'] * run['batch'] / speed)
    checkpoint = _bytes(distiller.state_dict().values()) + states
    return dict(
        config=cfg.filename, student=student, teachers=teachers, masker=_masker(distiller, grid, rates),
        losses=_losses(cfg, distiller, grid, teachers), parameters=_parameters(distiller), flops=flops, memory=memory,
        time=run, disk=files(cfg, run, checkpoint), notes=notes)


def _keep(distiller: HybridDistiller, rate: float) -> None:
    if distiller.masker is not None:
        distiller.masker.keep_rate = rate


def _image_size(cfg: Config, distiller: HybridDistiller) -> tuple[tuple[int, int], str]:
    """(height, width) of what the student is fed, and a note where it can only be supposed.

    The training pipeline is asked: it makes two black photographs of different sizes equally large, or it does not.
    """
    nominal = tuple(distiller.backbone.img_size)
    supposed = f'images of {nominal[1]}x{nominal[0]} px, as the student is built for, are supposed: '
    dataset = cfg.train_dataloader.dataset
    while 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.get('dataset') or dataset.datasets[0]
    pipeline, found = Compose(dataset.get('pipeline') or []), set()
    with tempfile.TemporaryDirectory() as folder:
        for height, width in ((600, 800), (900, 700)):
            path = str(Path(folder, f'{height}.png'))
            mmcv.imwrite(np.zeros((height, width, 3), np.uint8), path)
            try:
                sample = pipeline(dict(img_path=path, gt_label=0))
                inputs = distiller.data_preprocessor(
                    dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]), True)['inputs']
            except Exception as error:  # a pipeline of the user's may ask for anything
                return nominal, f'{supposed}the training pipeline needs the data ({type(error).__name__}: {error})'
            found.add(tuple(inputs.shape[-2:]))
    if len(found) > 1:
        return nominal, f'{supposed}the training pipeline leaves images as large as they are'
    return found.pop(), ''


def _optimizer_states(cfg: Config, distiller: HybridDistiller) -> int:
    """Bytes that the optimizer keeps, seen from one step of it on the meta device."""
    settings = {key: value for key, value in cfg.optim_wrapper.items() if key not in ('loss_scale', 'dtype')}
    distiller.losses.to('meta')
    optimizer = build_optim_wrapper(distiller, {**settings, 'type': 'OptimWrapper'}).optimizer
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return _bytes(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _count(module: nn.Module, trained: bool | None = None) -> int:
    return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad == trained)


def _parameters(distiller: HybridDistiller) -> dict:
    student = distiller.backbone
    return dict(
        student=_count(student), trained=_count(student, True), frozen=_count(student, False),
        losses={name: _count(loss) for name, loss in distiller.losses.items()},
        teachers={name: _count(teacher) for name, teacher in distiller.teachers.items()})


def _deepest(distiller: HybridDistiller) -> int:
    """Deepest layer of the student that runs."""
    return max(max(loss.student_taps) for loss in distiller.losses.values())


def _student(cfg: Config, distiller: HybridDistiller, **fed) -> dict:
    spec, start = distiller.backbone.spec, cfg.model.backbone.get('init_from')
    begin = (cfg.model.backbone.get('init_cfg') or {})
    source = 'random weights'
    if start and start.get('checkpoint', 'auto') is not None:
        source = _source(distiller.backbone.init_from.card, start.get('checkpoint', 'auto'))
    elif isinstance(begin, dict) and begin.get('type') == 'Pretrained':
        source = begin['checkpoint']
    return dict(width=spec.embed_dims, depth=spec.depth, heads=spec.num_heads, patch_size=spec.patch_size,
                extra_tokens=spec.num_extra_tokens, deepest_layer=_deepest(distiller), starts_from=source, **fed)


def _teachers(cfg: Config, distiller: HybridDistiller, grid: tuple[int, int], size: tuple[int, int]) -> dict:
    found, (_, runs) = {}, distiller.arithmetic(grid)
    for name, teacher in distiller.teachers.items():
        spec, checkpoint = teacher.spec, cfg.model.teachers[name].get('checkpoint', 'auto')
        found[name] = dict(
            model=teacher.model_name, width=spec.embed_dims, heads=spec.num_heads, patch_size=spec.patch_size,
            **runs[name], masked=teacher.masked, resized=runs[name]['image_size'] != list(size), mean=teacher.mean,
            std=teacher.std, renormalised=teacher._renormalises, bytes=_bytes(teacher.parameters()),
            weights=_source(getattr(teacher, 'card', None), checkpoint))
    return found


def _source(card, checkpoint: str | None) -> str:
    """Where weights come from, and whether they are here already."""
    if checkpoint is None:
        return 'random weights'
    url = card.url if card and checkpoint == 'auto' else checkpoint if '://' in checkpoint else None
    if url:
        path = cache_dir() / cached_name(url)
        return f'{path}, there' if path.exists() else f'to be fetched from {url}'
    if checkpoint == 'auto':
        return 'no URL is known: give a checkpoint' if card else 'to be fetched by its library, if it is not there'
    path = Path(checkpoint).expanduser()
    return f'{path}, there' if path.exists() else f'{path}{NOT_THERE}'


def _masker(distiller: HybridDistiller, grid: tuple[int, int], rates: list[float]) -> dict | None:
    masker = distiller.masker
    if masker is None:
        return None
    return dict(place=masker.place, scorer=type(masker.scorer).__name__, teacher=masker.teacher,
                scored_layers=sorted(masker.taps), keep_rate=rates[-1], keep_rate_range=[min(rates), max(rates)],
                counts=masker.counts(grid[0] * grid[1]),
                kept_by_layer=distiller.kept_by_layer(grid)[:_deepest(distiller) + 1])


def _losses(cfg: Config, distiller: HybridDistiller, grid: tuple[int, int], teachers: dict) -> dict:
    found, kept, patches = {}, distiller.kept_by_layer(grid), grid[0] * grid[1]
    for name, loss in distiller.losses.items():
        teacher = cfg.model.losses[name].teacher
        theirs = tuple(teachers[teacher]['grid'])
        pairs = getattr(loss, 'layers', None) or list(zip(sorted(loss.student_taps), sorted(loss.teacher_taps)))
        tokens = [kept[layer] if theirs == grid else theirs[0] * theirs[1] for layer, _ in pairs]
        if isinstance(loss, MaskedFeatureLoss):
            tokens = [patches - kept[layer] for layer, _ in pairs]
        found[name] = dict(
            type=type(loss).__name__, teacher=teacher, weight=loss.loss_weight, layers=[list(pair) for pair in pairs],
            tokens=tokens, grid=list(grid), teacher_grid=list(theirs),
            **{key: getattr(loss, key) for key in _SETTINGS if hasattr(loss, key)})
    return found


def _flops(distiller: HybridDistiller, grid: tuple[int, int], rates: list[float], step: Step,
           unmasked: dict[str, int]) -> dict:
    """FLOPs of an image in a training step, this way (mean over training) and the naive way: a student that sees every
    token, and teachers that run to their end."""
    forwards, gflops = [], []
    for rate in rates:
        _keep(distiller, rate)
        forward, runs = distiller.arithmetic(grid)
        forwards.append(forward)
        gflops.append({name: run['gflops'] for name, run in runs.items()})
    this = _way(mean(forwards), {name: mean(each[name] for each in gflops) for name in gflops[0]}, step.loss_flops,
                again=getattr(distiller.backbone, 'with_cp', False))
    masker, distiller.masker = distiller.masker, None
    forward, _ = distiller.arithmetic(grid)
    distiller.masker = masker
    whole = {name: teacher.describe_run(grid, {teacher.spec.depth - 1: frozenset({'features'})})['gflops']
             for name, teacher in distiller.teachers.items()}
    naive = _way(forward, whole, {**step.loss_flops, **unmasked})
    return dict(this=this, naive=naive, ratio=this['total'] / naive['total'])


def _way(forward: float, gflops: dict[str, float], losses: dict[str, int], again: bool = False) -> dict:
    """``again``: backward computes the forward once more."""
    forward, teachers = round(forward), {name: round(value * 1e9) for name, value in gflops.items()}
    backward = (3 if again else 2) * forward
    return dict(student_forward=forward, student_backward=backward, teachers=teachers, losses=losses,
                total=forward + backward + sum(teachers.values()) + sum(losses.values()))


def _memory(cfg: Config, distiller: HybridDistiller, grid: tuple[int, int], step: Step, states: int, run: dict,
            half: bool) -> dict:
    batch = run['batch']
    wrapper = cfg.get('model_wrapper_cfg') or {}
    trained = _bytes(p for p in distiller.parameters() if p.requires_grad)
    spec, last = distiller.backbone.spec, _deepest(distiller)
    tokens = sum(count + spec.num_extra_tokens for count in distiller.kept_by_layer(grid)[:last + 1])
    parts = dict(
        weights=_bytes(distiller.parameters()), gradients=trained,
        # DDP's buckets hold the gradients a second time.
        buckets=trained if run['gpus'] > 1 and not wrapper.get('gradient_as_bucket_view') else 0,
        optimizer=states, teachers=sum(_bytes(teacher.parameters()) for teacher in distiller.teachers.values()),
        half_weights=step.fixed, images=batch * 3 * 4 * grid[0] * grid[1] * spec.patch_size**2,
        teacher_outputs=batch * step.teachers, student=batch * step.student, losses=batch * step.losses)
    return dict(precision=16 if half else 32, tokens=tokens, bytes_per_value=step.student / (tokens * spec.embed_dims),
                **parts, total=sum(parts.values()))
