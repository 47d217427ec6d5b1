"""Token relations of a ViT layer and the distance between two models' relations.

The relation of tokens x is R = A B^T / sqrt(C / H) per relation head, where A and B are any of the layer's queries,
keys and values, split into H heads of C / H channels (Hybrid Distill, arXiv 2306.15876; relation heads: MiniLM v2).
"""
import logging
import math
import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG = logging.getLogger(__name__)

# Elements of one score block (batch x heads x rows x keys); 2^21 fp32 values are 8 MB, about a core's share of cache.
_BLOCK_ELEMENTS = 2**21


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    batch, tokens, channels = x.shape
    if channels % heads:
        raise ValueError(f'{heads} relation heads do not divide the width {channels}: choose a divisor of it.')
    return x.reshape(batch, tokens, heads, channels // heads).transpose(1, 2)


def token_relation(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """Scores R = A B^T / sqrt(d) before the softmax, (B, heads, N, N). Materialised: for tests and analysis."""
    a, b = split_heads(a, heads), split_heads(b, heads)
    return a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])


def relation_kl(a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, *, heads: int, temperature: float = 1.0,
                rows: int | None = None) -> Tensor:
    """KL(softmax(R_teacher / t) || softmax(R_student / t)), summed over keys, averaged over images, heads and queries.

    The TinyMIM form of the relation distance (arXiv 2301.01296). No (B, H, N, N) tensor is formed.

    On CUDA, where Triton is installed, fused kernels compute it with sums in fp32 (``relation_triton.py``), unless
    ``MMHDISTILL_TRITON=0`` is in the environment, ``rows`` is given or tokens are float64. Otherwise PyTorch does, in
    blocks of ``rows`` queries, in fp32 or wider, and takes the gradient while a block of scores is at hand.

    Args:
        a, b: student tokens, (B, N, C); for the ``qk`` relation the queries and keys.
        teacher_a, teacher_b: teacher tokens of the same N, (B, N, C'); they receive no gradient.
        heads: relation heads; divides C and C'.
        temperature: t above.
        rows: queries in a block of PyTorch's; chosen from the problem's size if None.
    """
    return _relation_distance(a, b, teacher_a, teacher_b, heads, _kl_block, temperature, rows)


def relation_smooth_l1(a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, *, heads: int, beta: float = 1.0,
                       rows: int | None = None) -> Tensor:
    """SmoothL1 of the raw scores, averaged over images, heads, queries and keys. Arguments as :func:`relation_kl`."""
    if beta < 0:
        raise ValueError(f'beta is a difference of scores, 0 or more, got {beta}.')
    return _relation_distance(a, b, teacher_a, teacher_b, heads, _smooth_l1_block, beta, rows)


def _kl_block(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Value per query row, (..., rows), and its gradient with respect to the student's scores.

    Both arguments, (..., rows, keys), are used up: the gradient takes the student's place.
    """
    if temperature != 1:
        student, teacher = student.div_(temperature), teacher.div_(temperature)
    log_p, log_t = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    t = torch.exp(log_t, out=teacher)
    value = log_t.sub_(log_p).mul_(t).sum(dim=-1)
    gradient = torch.exp(log_p, out=student).sub_(t)
    return value, gradient if temperature == 1 else gradient.div_(temperature)


def _smooth_l1_block(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    keys = student.shape[-1]
    value = F.smooth_l1_loss(student, teacher, beta=beta, reduction='none').mean(dim=-1)
    difference = student.sub_(teacher)
    gradient = difference.sign_() if beta == 0 else difference.div_(beta).clamp_(-1, 1)
    return value, gradient.div_(keys)


def _relation_distance(a, b, teacher_a, teacher_b, heads, block, parameter, rows) -> Tensor:
    if a.shape[:2] != teacher_a.shape[:2]:
        raise ValueError(f'student and teacher relations must cover the same tokens, got {tuple(a.shape[:2])} and '
                         f'{tuple(teacher_a.shape[:2])} (images, tokens).')
    batch, tokens, _ = a.shape
    if rows is None and _suits_triton(a, b, teacher_a, teacher_b):
        for x in (a, teacher_a):
            split_heads(x, heads)  # Raises where they do not divide.
        # A call that Dynamo does not look into: it would trace the first use's check.
        distance = torch.compiler.disable(_by_triton)(a, b, teacher_a, teacher_b, heads, block, parameter)
        if distance is not None:
            return distance
    if rows is None:
        rows = _BLOCK_ELEMENTS // (heads * tokens)
    # Asked here, since gradients are always off inside the function's forward.
    needs_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return _RelationDistance.apply(a, b, teacher_a, teacher_b, heads, block, parameter, min(max(rows, 1), tokens),
                                   needs_grad)


def _suits_triton(*tokens: Tensor) -> bool:
    """Under Triton's interpreter CPU tensors suit as well."""
    if os.environ.get('MMHDISTILL_TRITON') == '0':
        return False
    a, b, teacher_a, teacher_b = tokens
    return ((a.is_cuda or os.environ.get('TRITON_INTERPRET') == '1') and len({x.device for x in tokens}) == 1
            and a.shape == b.shape and teacher_a.shape == teacher_b.shape
            and all(x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in tokens))


def _by_triton(a, b, teacher_a, teacher_b, heads, block, parameter) -> Tensor | None:
    tokens = a, b, teacher_a, teacher_b
    dims = a.shape[-1] // heads, teacher_a.shape[-1] // heads
    distance = _checked_kernels(a.device, tuple(x.dtype for x in tokens), *dims, block)
    return distance and distance(*tokens, heads, block is _kl_block, parameter)


@cache
def _checked_kernels(device: torch.device, dtypes: tuple[torch.dtype, ...], dim: int, teacher_dim: int,
                     block: Callable) -> Callable | None:
    """``relation_triton.relation_distance`` if it compiles for these tokens and agrees with PyTorch on a small case."""
    try:
        from .relation_triton import relation_distance
    except Exception as error:  # A broken installation raises anything.
        _say(f'Triton cannot be imported ({_first_line(error)})')
        return None
    generator = torch.Generator().manual_seed(0)  # The global generator's draws belong to the training.
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # More tokens than the largest tile has, and no multiple of it.
            drawn = [torch.randn(1, 70, 2 * width, generator=generator).to(device, dtype)
                     for width, dtype in zip((dim, dim, teacher_dim, teacher_dim), dtypes)]
            tokens = [x.requires_grad_(i < 2) for i, x in enumerate(drawn)]
            exact = [x.detach().double().requires_grad_(i < 2) for i, x in enumerate(drawn)]
            got = relation_distance(*tokens, 2, block is _kl_block, 1.0)
            want = _RelationDistance.apply(*exact, 2, block, 1.0, 70, True)
            pairs = [(got, want), *zip(torch.autograd.grad(got, tokens[:2]), torch.autograd.grad(want, exact[:2]))]
        error = max(((g - w).abs().max() / w.abs().max()).item() for g, w in pairs)
        if not error < 1e-2:
            raise RuntimeError(f'its result is off by {error:.0%}')
    except Exception as error:  # So does a compiler or a driver.
        _say(f'the Triton kernel for {dtypes[0]} tokens and heads of {dim} and {teacher_dim} channels does not work '
             f'here ({_first_line(error)})')
        return None
    return relation_distance


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@cache
def _say(reason: str) -> None:
    _LOG.warning('Token relations are computed by PyTorch, not by the fused kernel: %s.', reason)


class _RelationDistance(torch.autograd.Function):
    """Mean over images, heads and queries of ``block``, with the gradient of a and b computed in the forward pass.

    The value is a scalar, so its gradient is known up to one factor: nothing is recomputed in backward and what is
    kept is the size of a and b.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, heads: int,
                block: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]], parameter: float, rows: int,
                needs_grad: bool) -> Tensor:
        # fp32 at least: half precision scores overflow, and their softmax loses the small probabilities.
        dtype = torch.promote_types(a.dtype, torch.float32)
        batch, tokens, width = a.shape
        scale, teacher_scale = (width / heads)**-0.5, (teacher_a.shape[-1] / heads)**-0.5
        weight = 1 / (batch * heads * tokens)
        # Whole images to a block where several fit, else a part of one image's queries.
        images = max(1, _BLOCK_ELEMENTS // (heads * tokens * tokens)) if rows == tokens else 1
        grad_a, grad_b = (torch.empty_like(x, dtype=dtype) for x in (a, b)) if needs_grad else (None, None)
        total = a.new_zeros((), dtype=dtype)
        with torch.autocast(a.device.type, enabled=False):
            for first in range(0, batch, images):
                part = slice(first, first + images)
                # Scaled here, where there are N x d of them and not N x N.
                a_, b_, ta_, tb_ = (split_heads(x[part].to(dtype), heads) for x in (a, b, teacher_a, teacher_b))
                a_, ta_ = (a_ * scale).contiguous(), (ta_ * teacher_scale).contiguous()
                b_, tb_ = b_.contiguous(), tb_.contiguous()
                if needs_grad:
                    into_a, into_b = (split_heads(x[part], heads) for x in (grad_a, grad_b))
                    sum_b = torch.zeros_like(b_)
                for start in range(0, tokens, rows):
                    query = slice(start, start + rows)
                    student = a_[:, :, query] @ b_.transpose(-1, -2)
                    teacher = ta_[:, :, query] @ tb_.transpose(-1, -2)
                    value, gradient = block(student, teacher, parameter)
                    total += value.sum() * weight
                    if needs_grad:
                        into_a[:, :, query] = gradient @ b_
                        sum_b += gradient.transpose(-1, -2) @ a_[:, :, query]
                if needs_grad:
                    into_b.copy_(sum_b)
        if needs_grad:
            ctx.save_for_backward(grad_a, grad_b)
            ctx.factors = scale * weight, weight
            ctx.dtypes = a.dtype, b.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        grads = ((g * (grad_output * factor)).to(dtype)
                 for g, factor, dtype in zip(ctx.saved_tensors, ctx.factors, ctx.dtypes))
        return *grads, None, None, None, None, None, None, None
