"""Reading q, k, v of attention that is not ours, as the attention sees them."""
import inspect

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MHA = inspect.signature(F.multi_head_attention_forward)


class AttentionReader(TorchFunctionMode):
    """Records q, k, v of every attention that is computed inside it, each (B, N, C), heads side by side.

    They are taken where ``scaled_dot_product_attention`` receives them: after separate or fused projections, norms of q
    and k, and rotary position embeddings; q carries any scale that is not the usual one. ``nn.MultiheadAttention`` is
    read too. What a product of q and k does not tell (masks and position biases, fewer key heads) is refused.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[dict[str, Tensor]] = []
        self.num_heads: int | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._attention(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            self._multi_head(**_MHA.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                   enable_gqa=False):
        if attn_mask is not None or is_causal:
            raise ValueError('its attention adds a mask or a position bias, so q and k alone are not what it sees')
        if not query.shape[1] == key.shape[1] == value.shape[1] or query.shape[-2] != key.shape[-2]:
            raise ValueError(f'its attention has queries {tuple(query.shape)} and keys {tuple(key.shape)}, not of the '
                             'same heads and tokens')
        if scale is not None:
            query = query * (scale * query.shape[-1]**0.5)
        self.num_heads = query.shape[1]
        self.calls.append({kind: x.transpose(1, 2).flatten(2) for kind, x in zip('qkv', (query, key, value))})

    def _multi_head(self, query, key, value, num_heads, in_proj_weight, in_proj_bias, bias_k=None, attn_mask=None,
                    key_padding_mask=None, use_separate_proj_weight=False, add_zero_attn=False, **kwargs):
        if attn_mask is not None or key_padding_mask is not None or bias_k is not None or add_zero_attn \
                or use_separate_proj_weight or query is not key or key is not value:
            raise ValueError('its nn.MultiheadAttention is no plain self-attention')
        # Tokens come first there.
        qkv = F.linear(query, in_proj_weight, in_proj_bias).transpose(0, 1).chunk(3, dim=-1)
        self.num_heads = num_heads
        self.calls.append(dict(zip('qkv', qkv)))


class BlockReader:
    """Runs a model as deep as ``taps`` ask and reads its blocks with hooks, which it removes.

    Args:
        blocks: the model's transformer blocks, in order.
        norm: the final norm.
    """

    def __init__(self, blocks: nn.ModuleList, norm: nn.Module | None):
        self.blocks = blocks
        self.norm = norm
        self.num_heads: int | None = None

    def __call__(self, run, taps) -> dict[tuple[int, str], Tensor]:
        """``run()`` is the model's forward. Raises ValueError, with the reason only, for what cannot be read."""
        recorded, reader, handles, begun = {}, None, [], set()
        deepest = max(taps)
        if isinstance(self.norm, nn.Identity | None) and any('features' in kinds for kinds in taps.values()):
            raise ValueError('it has no final norm of its tokens (it may pool first), so it has no final features')

        def before(index, block):
            nonlocal reader
            if block in begun:
                raise ValueError(f'block {index} runs, or is, more than once')
            begun.add(block)
            if taps.get(index, frozenset()) & {'q', 'k', 'v'}:
                reader = AttentionReader()
                reader.__enter__()

        def after(index, output):
            nonlocal reader
            kinds = taps.get(index, frozenset())
            if reader is not None:
                reader.__exit__(None, None, None)
                done, reader = reader, None
                if len(done.calls) != 1:
                    raise ValueError(f'block {index} computes attention {len(done.calls)} times through '
                                     'scaled_dot_product_attention or nn.MultiheadAttention, and once is expected')
                recorded.update({(index, kind): done.calls[0][kind] for kind in kinds & {'q', 'k', 'v'}})
                self.num_heads = done.num_heads
            output = output[0] if isinstance(output, tuple) else output
            if 'hidden' in kinds:
                recorded[index, 'hidden'] = output
            if 'features' in kinds:
                recorded[index, 'features'] = self.norm(output)
            if index == deepest:
                raise _Done

        try:
            for index, block in enumerate(self.blocks):
                handles += [block.register_forward_pre_hook(lambda block, _, i=index: before(i, block)),
                            block.register_forward_hook(lambda _, __, output, i=index: after(i, output))]
            run()
        except _Done:
            pass
        finally:
            if reader is not None:
                reader.__exit__(None, None, None)
            for handle in handles:
                handle.remove()
        if unread := set(taps) - {layer for layer, _ in recorded}:
            raise ValueError(f'its forward did not run blocks {sorted(unread)}')
        return recorded


class _Done(Exception):
    """The deepest block that is asked for has run."""
