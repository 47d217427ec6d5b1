import math

import torch
from mmengine.logging import MMLogger
from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...functional import from_windows, relative_attention, resample_positions, resample_table, split_heads, to_windows
from ...registry import MODELS
from ..students.checkpoint import check_fit
from ..vit import embed


@MODELS.register_module()
class ViTDet(VisionTransformer):
    """A plain ViT for detection at high resolution: windowed attention, global in a few blocks (arXiv 2203.16527).

    Parameter names are those of ``mmpretrain.VisionTransformer``, so a student's checkpoint loads: strictly, except
    that relative positions start at zero and the class token, its position and the final norm are dropped; both are
    named in the log. Positions, and a global block's relative positions, are resampled to ``img_size`` when they are
    loaded, and from there to whatever size comes.

    Args:
        arch, patch_size, drop_path_rate, norm_cfg, layer_scale_init_value, pre_norm, layer_cfgs, frozen_stages,
            init_cfg: as in the base class; frozen stages also stay in eval mode.
        img_size: size in pixels that positions are kept for, that of training: a multiple of the patch size.
        window_size: side of a window in patches; tokens that only fill up the last window are no keys [choice].
        global_blocks: blocks that see the whole image, from 0; by default the last of each quarter.
        rel_pos: decomposed relative positions, zero at first.
        final_norm: keep the norm after the last block; the pyramid has norms of its own.
        with_cp: recompute blocks in the backward pass, for less memory.

    Returns:
        A tuple of the last block's map, (B, C, h, w).
    """

    def __init__(self, arch: str | dict = 'base', img_size: int | tuple[int, int] = 1024, patch_size: int = 16,
                 window_size: int = 14, global_blocks: list[int] | None = None, rel_pos: bool = True,
                 final_norm: bool = False, with_cp: bool = False, **kwargs):
        super().__init__(arch, img_size, patch_size, final_norm=final_norm, out_type='featmap', with_cls_token=False,
                         **kwargs)
        patch = self.patch_embed.projection.kernel_size
        if any(side % step for side, step in zip(self.img_size, patch)):
            raise ValueError(f'img_size={self.img_size} cannot be cut into patches of {patch[0]}x{patch[1]}: give a '
                             'multiple of the patch size.')
        if global_blocks is None:
            global_blocks = sorted({max(self.num_layers * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)})
        wrong = [index for index in global_blocks if not 0 <= index < self.num_layers]
        if wrong or window_size < 1:
            raise ValueError(f'window_size={window_size}, global_blocks={list(global_blocks)}: windows have a side of '
                             f'at least 1 patch, and blocks are counted from 0 to {self.num_layers - 1}.')
        self.windows = [None if index in global_blocks else window_size for index in range(self.num_layers)]
        self.with_cp = with_cp
        for block, window in zip(self.layers, self.windows):
            for name, side in zip(('rel_pos_h', 'rel_pos_w'), self.patch_resolution):
                table = torch.zeros(2 * (window or side) - 1, block.attn.head_dims)
                block.attn.register_parameter(name, nn.Parameter(table) if rel_pos else None)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """
        Args:
            x: (B, 3, H, W), normalised; H and W multiples of the patch size.
        """
        tokens, grid = embed(self, x)
        for block, window in zip(self.layers, self.windows):
            if self.with_cp and tokens.requires_grad:
                tokens = checkpoint(_run, block, tokens, grid, window, use_reentrant=False)
            else:
                tokens = _run(block, tokens, grid, window)
        if self.final_norm:
            tokens = self.ln1(tokens)
        return (tokens.transpose(1, 2).unflatten(2, grid).contiguous(), )

    def train(self, mode: bool = True) -> 'ViTDet':
        super().train(mode)
        if self.frozen_stages > 0:
            self._freeze_stages()
        return self

    def _prepare_pos_embed(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        """Called before loading: fit the file to this model, or say why it cannot be."""
        own = self.state_dict()
        there = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        if not there:
            return
        fitted = self._resample(there) if 'pos_embed' in there else {}
        new, dropped = check_fit(self, {**there, **fitted})
        for name in dropped:
            del state_dict[prefix + name]
        fitted.update((name, own[name]) for name in new)
        state_dict.update((prefix + name, x) for name, x in fitted.items())
        if new or dropped:
            MMLogger.get_current_instance().info(
                f'ViTDet: {len(there) - len(dropped)} tensors loaded, dropped: {", ".join(dropped) or "none"}; new, '
                f'as initialised: {", ".join(new) or "none"}')

    def _resample(self, there: dict[str, Tensor]) -> dict[str, Tensor]:
        """Positions of the file, absolute and of its global blocks, for this model's grid."""
        patches = there['pos_embed'][:, int('cls_token' in there):]
        target = source = tuple(self.patch_resolution)
        if patches.shape[1] != target[0] * target[1]:
            source = (math.isqrt(patches.shape[1]), ) * 2
            if source[0]**2 != patches.shape[1]:
                raise ValueError(
                    f'these weights have positions of {patches.shape[1]} patches, which are not those of a square '
                    f'image, so their rows cannot be told: give img_size as they were trained with, and not '
                    f'{self.img_size}, whose {target[0]}x{target[1]} patches are {target[0] * target[1]}.')
        fitted = {'pos_embed': resample_positions(patches, source, target)}
        for index, window in enumerate(self.windows):
            for letter, old, new in zip('hw', source, target):
                name = f'layers.{index}.attn.rel_pos_{letter}'
                if window is None and name in there and len(there[name]) == 2 * old - 1:
                    fitted[name] = resample_table(there[name], new)
        return fitted


def _run(block: nn.Module, tokens: Tensor, grid: tuple[int, int], window: int | None) -> Tensor:
    """One block on (B, h w, C)."""
    attn = block.attn
    q, k, v = (split_heads(part, attn.num_heads) for part in attn.qkv(block.ln1(tokens)).chunk(3, dim=-1))
    dropout = attn.attn_drop if attn.training else 0.0
    tables = None if attn.rel_pos_h is None else (attn.rel_pos_h, attn.rel_pos_w)
    if window is None:
        y = relative_attention(q, k, v, grid, tables, dropout=dropout)
    else:
        (q, inside), (k, _), (v, _) = (to_windows(part, grid, window) for part in (q, k, v))
        y = from_windows(relative_attention(q, k, v, (window, window), tables, inside, dropout), grid, window)
    tokens = tokens + attn.out_drop(attn.gamma1(attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))))
    return block.ffn(block.ln2(tokens), identity=tokens)
