"""One training step again, with its samples and its random numbers: what it computes layer by layer."""
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor, nn

from ..functional import split_heads
from .optim.layer_decay import find_vits
from .seeding import SampleIndex, load_samples, seed_step


def plain_model(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def forward(model: nn.Module, wrapper: OptimWrapper, batch: dict, seed: int, iteration: int,
            rank: int) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Losses of a step by name, and :func:`watch_layers` of it; drawn from its own random numbers."""
    seed_step(seed, iteration, rank)
    with watch_layers(model) as layers, wrapper.optim_context(model):
        inputs = model.data_preprocessor(batch, True)
        losses = model(**inputs, mode='loss') if isinstance(inputs, dict) else model(*inputs, mode='loss')
    return dict(model.parse_losses(losses)[1]), layers


@contextmanager
def watch_layers(model: nn.Module) -> Iterator[dict[str, dict]]:
    """For every ViT of ``model``, its teachers included, and every layer that runs inside the block:
    ``backbone.layers.0`` -> ``tokens`` and ``scores``, the least and the greatest of the layer's input and of its
    attention's scores before the softmax, and ``nonfinite``, how many of both are none. Ranges are of finite values."""
    found: dict[str, dict] = {}
    handles = [block.ln1.register_forward_hook(partial(_note, found, f'{name}.layers.{i}', block.attn))
               for name, vit in _vits(model).items() for i, block in enumerate(vit.layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _vits(model: nn.Module) -> dict[str, VisionTransformer]:
    vits = {name.rstrip('.') or 'model': vit for name, vit in find_vits(model).items()}
    # Teachers are outside of the module tree.
    teachers = {name: getattr(teacher, 'vit', None) for name, teacher in getattr(model, 'teachers', {}).items()}
    return vits | {f'teachers.{name}': vit for name, vit in teachers.items() if isinstance(vit, VisionTransformer)}


@torch.no_grad()
def _note(found: dict, name: str, attn: nn.Module, ln1: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    # Detached: autocast would keep its copy of the weight, made without a gradient, for the attention that follows.
    weight, bias = (x if x is None else x.detach() for x in (attn.qkv.weight, attn.qkv.bias))
    q, k, _ = F.linear(output, weight, bias).chunk(3, dim=-1)
    q, k = (split_heads(part, attn.num_heads).float() for part in (q, k))
    # An image at a time: all scores of one layer may be more than the step itself has room for.
    scores = (qi @ ki.transpose(-1, -2) / math.sqrt(q.shape[-1]) for qi, ki in zip(q, k))
    (tokens, broken_tokens), (scores, broken_scores) = _range([inputs[0].float()]), _range(scores)
    found[name] = dict(tokens=tokens, scores=scores, nonfinite=broken_tokens + broken_scores)


def _range(parts: Iterable[Tensor]) -> tuple[list[float] | None, int]:
    """Least and greatest of the finite values, and how many are not finite."""
    low, high, broken = math.inf, -math.inf, 0
    for x in parts:
        finite = x[x.isfinite()]
        broken += x.numel() - len(finite)
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return [low, high] if low <= high else None, broken


def nonfinite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient has a value that is not finite."""
    return [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


def replay(runner: Runner, record: dict) -> dict:
    """The step of ``record``, which :class:`NonFiniteSentinel` wrote, from the checkpoint that ``runner`` resumes, in
    one process, however many the run had.

    Returns:
        ``losses``, name -> value; ``layers``, see :func:`watch_layers`; ``gradients``, names of those not finite.

    Raises:
        ValueError: the checkpoint is not of the state before that step, or the record does not know its samples.
    """
    if record['samples'] is None:
        raise ValueError('the record does not say which samples the step had: the run had a train loop or batch '
                         'sampler of its own, so the step cannot be done again.')
    if switches := [type(hook).__name__ for hook in runner.hooks if _switches(hook)]:
        runner.logger.warning(f'{", ".join(switches)}: what hooks do before training or an epoch is not done again. If '
                              'they had switched a pipeline or a loss by then, this is another step.')
    runner.call_hook('before_run')
    runner._init_model_weights()
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    # Not ours, which looks for the place in an epoch: one process has more batches than each of several.
    Runner.resume(runner, runner._load_from)
    if runner.iter != record['iteration']:
        raise ValueError(f'the checkpoint was written after {runner.iter} iterations, and the record is of the one '
                         f'after {record["iteration"]}: give the record whose checkpoint it is.')
    model, loader = plain_model(runner), runner.train_dataloader
    if record['keep_rate'] is not None:
        model.masker.keep_rate = record['keep_rate']
    # JSON has no tuples; mmdet's video and frame are one.
    samples = [SampleIndex(tuple(index) if isinstance(index, list) else index, tuple(counters))
               for index, counters in record['samples']]
    batch = loader.collate_fn(load_samples(loader.dataset, samples))
    model.train()
    counters = record['seed'], record['batch_iteration'], record['rank']
    losses, layers = forward(model, runner.optim_wrapper, batch, *counters)
    runner.optim_wrapper.zero_grad()
    losses['loss'].backward()
    return dict(losses={name: float(x.detach()) for name, x in losses.items()}, layers=layers,
                gradients=nonfinite_gradients(model))


def _switches(hook: Hook) -> bool:
    """Whether it does something before training or an epoch, by code that is neither mmengine's nor ours."""
    if isinstance(hook, EMAHook):  # mmpretrain has its own; averages have no part in a step
        return False
    methods = type(hook).before_train, type(hook).before_train_epoch
    return any(method.__module__.partition('.')[0] not in ('mmengine', 'mmhdistill') for method in methods)


def as_table(layers: dict[str, dict]) -> str:
    """One line per layer."""
    def text(values: list[float] | None) -> str:
        return 'none is finite' if values is None else f'{values[0]:.4g} to {values[1]:.4g}'

    lines = [f'{"layer":<28} {"tokens":>26} {"attention scores":>26} {"not finite":>10}']
    lines += [f'{name:<28} {text(layer["tokens"]):>26} {text(layer["scores"]):>26} {layer["nonfinite"]:>10}'
              for name, layer in layers.items()]
    return '\n'.join(lines)
