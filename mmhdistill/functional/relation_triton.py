"""Token-relation distances as fused Triton kernels: scores live in tiles on the chip, as in FlashAttention
(arXiv 2205.14135), here for two softmaxes at once. Importing this module needs Triton; ``relation.py`` decides on it.

Beside inputs and gradients only rows are kept: for every image, head and query the distance and, of both softmaxes,
largest score and sum. (Their log-sum-exp would do, but where scores are far from zero it has fewer digits.) The
backward pass forms the scores again, once by queries for the gradient of A and once by keys for that of B, so it needs
no atomic addition and gives the same bits every time.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_HEAD_DIM = 256

# Gradients of scores are at most 1 and mostly far smaller, where float16 has few digits or none (below 6e-8).
_GAIN = tl.constexpr(1024.0)


@triton.jit
def _dot(x, y, UPCAST: tl.constexpr):
    # Products of two half-precision numbers are exact in fp32: what is cast up gives the same sum.
    if UPCAST:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, input_precision='ieee')


@triton.jit
def _dot_fp32(x, y, UPCAST: tl.constexpr):
    """x y for an fp32 x. With a half-precision y on tensor cores, by x in two parts that keep 16 bits or more of it."""
    if y.dtype == tl.float32:
        total = tl.dot(x, y, input_precision='ieee')
    else:
        high = x.to(y.dtype)
        total = _dot(high, y, UPCAST) + _dot((x - high.to(tl.float32)).to(y.dtype), y, UPCAST)
    return total


@triton.jit
def _offsets(image, token, head, image_stride, token_stride, channel_stride, DIM: tl.constexpr,
             PADDED: tl.constexpr):
    # 64 bits: a large batch of wide tokens has more than 2^31 elements.
    channel = head * DIM + tl.arange(0, PADDED)
    return (image.to(tl.int64) * image_stride + token.to(tl.int64)[:, None] * token_stride
            + channel.to(tl.int64)[None, :] * channel_stride)


@triton.jit
def _load(x, image, token, tokens, head, image_stride, token_stride, channel_stride, DIM: tl.constexpr,
          PADDED: tl.constexpr):
    """Some tokens' channels of one head, (BLOCK, PADDED); zeros past the last token and the last channel."""
    offsets = _offsets(image, token, head, image_stride, token_stride, channel_stride, DIM, PADDED)
    mask = (token[:, None] < tokens) & (tl.arange(0, PADDED)[None, :] < DIM)
    return tl.load(x + offsets, mask=mask, other=0.0)


@triton.jit
def _value_kernel(a, b, teacher_a, teacher_b, value, softmax,
                  a_image, a_token, a_channel, b_image, b_token, b_channel,
                  ta_image, ta_token, ta_channel, tb_image, tb_token, tb_channel,
                  heads, tokens, scale, teacher_scale, beta, KL: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
                  TEACHER_DIM: tl.constexpr, TEACHER_PADDED: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
                  TEACHER_UPCAST: tl.constexpr):
    """One block of queries against all keys: the distance of each query's row and, for KL, both softmaxes' (4, pairs,
    tokens) largest score and sum: the student's two, then the teacher's."""
    blocks = tl.cdiv(tokens, BLOCK)
    pair = tl.program_id(0) // blocks
    image = pair // heads
    head = pair % heads
    query = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    rows = _load(a, image, query, tokens, head, a_image, a_token, a_channel, DIM, PADDED)
    teacher_rows = _load(teacher_a, image, query, tokens, head, ta_image, ta_token, ta_channel, TEACHER_DIM,
                         TEACHER_PADDED)
    total = tl.zeros((BLOCK, ), tl.float32)
    # Of both softmaxes: the largest score so far and the sum of exp(score - largest).
    s_max = tl.full((BLOCK, ), float('-inf'), tl.float32)
    t_max = tl.full((BLOCK, ), float('-inf'), tl.float32)
    s_sum = tl.zeros((BLOCK, ), tl.float32)
    t_sum = tl.zeros((BLOCK, ), tl.float32)
    for start in range(0, tokens, BLOCK):
        key = start + tl.arange(0, BLOCK)
        columns = _load(b, image, key, tokens, head, b_image, b_token, b_channel, DIM, PADDED)
        teacher_columns = _load(teacher_b, image, key, tokens, head, tb_image, tb_token, tb_channel, TEACHER_DIM,
                                TEACHER_PADDED)
        s = _dot(rows, tl.trans(columns), UPCAST) * scale
        t = _dot(teacher_rows, tl.trans(teacher_columns), TEACHER_UPCAST) * teacher_scale
        # Zero for a key past the end, whose two scores are both zero: SmoothL1 needs no mask.
        difference = t - s
        if KL:
            s = tl.where(key[None, :] < tokens, s, float('-inf'))
            t = tl.where(key[None, :] < tokens, t, float('-inf'))
            s_new = tl.maximum(s_max, tl.max(s, 1))
            t_new = tl.maximum(t_max, tl.max(t, 1))
            s_sum = s_sum * tl.exp(s_max - s_new) + tl.sum(tl.exp(s - s_new[:, None]), 1)
            shrink = tl.exp(t_max - t_new)
            weight = tl.exp(t - t_new[:, None])
            t_sum = t_sum * shrink + tl.sum(weight, 1)
            total = total * shrink + tl.sum(weight * difference, 1)
            s_max = s_new
            t_max = t_new
        else:
            size = tl.abs(difference)
            total += tl.sum(tl.where(size < beta, size * size / (2 * beta), size - beta / 2), 1)
    out = pair.to(tl.int64) * tokens + query
    if KL:
        # sum_j p_t (t - s) - lse_t + lse_s is the divergence of softmax(s) from softmax(t).
        total = total / t_sum + (s_max - t_max) + (tl.log(s_sum) - tl.log(t_sum))
        size = tl.num_programs(0).to(tl.int64) // blocks * tokens
        tl.store(softmax + out, s_max, mask=query < tokens)
        tl.store(softmax + size + out, s_sum, mask=query < tokens)
        tl.store(softmax + 2 * size + out, t_max, mask=query < tokens)
        tl.store(softmax + 3 * size + out, t_sum, mask=query < tokens)
    else:
        total = total / tokens
    tl.store(value + out, total, mask=query < tokens)


@triton.jit
def _gradient_kernel(own, other, teacher_own, teacher_other, grad, grad_output, softmax,
                     own_image, own_token, own_channel, other_image, other_token, other_channel,
                     town_image, town_token, town_channel, tother_image, tother_token, tother_channel,
                     grad_image, grad_token, grad_channel,
                     heads, tokens, scale, teacher_scale, beta, factor, OWN_ARE_QUERIES: tl.constexpr,
                     KL: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TEACHER_DIM: tl.constexpr,
                     TEACHER_PADDED: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
                     TEACHER_UPCAST: tl.constexpr):
    """Gradient of one block of ``own``, A's rows or B's, from the scores with all of ``other``."""
    blocks = tl.cdiv(tokens, BLOCK)
    pair = tl.program_id(0) // blocks
    image = pair // heads
    head = pair % heads
    here = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    rows = _load(own, image, here, tokens, head, own_image, own_token, own_channel, DIM, PADDED)
    teacher_rows = _load(teacher_own, image, here, tokens, head, town_image, town_token, town_channel, TEACHER_DIM,
                         TEACHER_PADDED)
    size = tl.num_programs(0).to(tl.int64) // blocks * tokens
    softmax += pair.to(tl.int64) * tokens
    total = tl.zeros((BLOCK, PADDED), tl.float32)
    for start in range(0, tokens, BLOCK):
        there = start + tl.arange(0, BLOCK)
        columns = _load(other, image, there, tokens, head, other_image, other_token, other_channel, DIM, PADDED)
        teacher_columns = _load(teacher_other, image, there, tokens, head, tother_image, tother_token,
                                tother_channel, TEACHER_DIM, TEACHER_PADDED)
        s = _dot(rows, tl.trans(columns), UPCAST) * scale
        t = _dot(teacher_rows, tl.trans(teacher_columns), TEACHER_UPCAST) * teacher_scale
        if KL:
            query = here[:, None] if OWN_ARE_QUERIES else there[None, :]
            s_max = tl.load(softmax + query, mask=query < tokens, other=0.0)
            s_sum = tl.load(softmax + size + query, mask=query < tokens, other=0.0)
            t_max = tl.load(softmax + 2 * size + query, mask=query < tokens, other=0.0)
            t_sum = tl.load(softmax + 3 * size + query, mask=query < tokens, other=0.0)
            gradient = tl.exp(s - s_max) * (1 / s_sum) - tl.exp(t - t_max) * (1 / t_sum)
        else:
            difference = s - t
            sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
            gradient = tl.where(tl.abs(difference) < beta, difference / beta, sign)
        # Past the last token exp(0 - max) may be infinite, and infinity times a zero of ``columns`` is not zero.
        gradient = tl.where(there[None, :] < tokens, gradient, 0.0)
        total += _dot_fp32(gradient * _GAIN, columns, UPCAST)
    total *= tl.load(grad_output) * (factor / _GAIN)
    offsets = _offsets(image, here, head, grad_image, grad_token, grad_channel, DIM, PADDED)
    mask = (here[:, None] < tokens) & (tl.arange(0, PADDED)[None, :] < DIM)
    tl.store(grad + offsets, total.to(grad.dtype.element_ty), mask=mask)


# The interpreter's dots of bfloat16 multiply bit patterns, and its casts to bfloat16 truncate.
_INTERPRETED = not isinstance(_value_kernel, triton.JITFunction)


def relation_distance(a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, heads: int, kl: bool,
                      parameter: float) -> Tensor:
    """The KL divergence (``parameter``: its temperature) or SmoothL1 (its beta) of ``relation.py``.

    Tokens are read where they lie, whatever their strides: (B, N, C) of the student, (B, N, C') of the teacher, all on
    one device, in float32, float16 or bfloat16. Raises where the kernels do not run.
    """
    widest = max(a.shape[-1], teacher_a.shape[-1]) // heads
    if widest > MAX_HEAD_DIM:
        raise ValueError(f'relation heads of {widest} channels are wider than {MAX_HEAD_DIM}')
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 0):
        raise RuntimeError(f'{torch.cuda.get_device_name(a.device)} is older than compute capability 8.0')
    return _FusedRelationDistance.apply(a, b, teacher_a, teacher_b, heads, kl, parameter)


def tile_options(dtypes: tuple[torch.dtype, ...], dim: int, teacher_dim: int) -> dict:
    """Compile-time sizes: next to no spilled registers and less than 72 KB of shared memory from sm_80 on."""
    padded, teacher_padded = (max(16, triton.next_power_of_2(x)) for x in (dim, teacher_dim))
    widest, half = max(padded, teacher_padded), torch.float32 not in dtypes
    # Elements of a tile's row at which it has to become shorter.
    narrow, wide = (64, 256) if half else (0, 128)
    block = 64 if widest <= narrow else 32 if widest <= wide else 16
    return dict(DIM=dim, PADDED=padded, TEACHER_DIM=teacher_dim, TEACHER_PADDED=teacher_padded, BLOCK=block,
                UPCAST=_INTERPRETED or dtypes[0] != dtypes[1],
                TEACHER_UPCAST=_INTERPRETED or dtypes[2] != dtypes[3], num_warps=8 if block == 16 else 4, num_stages=2)


class _FusedRelationDistance(torch.autograd.Function):

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, heads: int, kl: bool,
                parameter: float) -> Tensor:
        batch, tokens, channels = a.shape
        dim, teacher_dim = channels // heads, teacher_a.shape[-1] // heads
        options = dict(tile_options(tuple(x.dtype for x in (a, b, teacher_a, teacher_b)), dim, teacher_dim), KL=kl)
        temperature, beta = (parameter, 0.0) if kl else (1.0, parameter)
        scale = dim**-0.5 / temperature
        scalars = heads, tokens, scale, teacher_dim**-0.5 / temperature, beta
        value = a.new_empty(batch, heads, tokens, dtype=torch.float32)
        softmax = a.new_empty(4 if kl else 0, batch, heads, tokens, dtype=torch.float32)
        strides = (stride for x in (a, b, teacher_a, teacher_b) for stride in x.stride())
        ctx.grid = triton.cdiv(tokens, options['BLOCK']) * batch * heads,
        with torch.cuda.device_of(a):
            _value_kernel[ctx.grid](a, b, teacher_a, teacher_b, value, softmax, *strides, *scalars, **options)
        ctx.save_for_backward(a, b, teacher_a, teacher_b, softmax)
        ctx.scalars, ctx.options = scalars, options
        # Means over images, heads and queries, and for SmoothL1 over keys.
        ctx.factor = scale / (batch * heads * tokens * (1 if kl else tokens))
        return value.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        a, b, teacher_a, teacher_b, softmax = ctx.saved_tensors
        grads = [None, None]
        for i, tokens in enumerate([(a, b, teacher_a, teacher_b), (b, a, teacher_b, teacher_a)]):
            if ctx.needs_input_grad[i]:
                dtype = torch.float32 if _INTERPRETED else tokens[0].dtype
                grad = torch.empty(tokens[0].shape, dtype=dtype, device=a.device)
                strides = (stride for x in (*tokens, grad) for stride in x.stride())
                with torch.cuda.device_of(a):
                    _gradient_kernel[ctx.grid](*tokens, grad, grad_output, softmax, *strides, *ctx.scalars, ctx.factor,
                                               OWN_ARE_QUERIES=i == 0, **ctx.options)
                grads[i] = grad.to(tokens[0].dtype)
        return *grads, None, None, None, None, None
