import torch
from mmengine.model import BaseModule
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from torch import Tensor, nn

from ...functional import scatter_tokens, sincos_positions
from ...registry import MODELS


@MODELS.register_module()
class MaskDecoder(BaseModule):
    """The asymmetric decoder of masked image modelling (MAE, arXiv 2111.06377): fills in what the encoder did not see.

    Encoded tokens are projected to a narrower width, one learned mask token stands for every dropped patch, fixed
    sin-cos positions are added, and a few blocks and a linear layer predict a target for every patch. Thrown away after
    pre-training.

    Args:
        in_channels, out_channels: widths of the encoder's tokens and of the target; given by the loss.
        embed_dims, depth, num_heads: of the decoder [choice].
    """

    def __init__(self, in_channels: int, out_channels: int, embed_dims: int = 512, depth: int = 1, num_heads: int = 8,
                 init_cfg: dict | None = None):
        super().__init__(init_cfg or dict(type='Xavier', layer='Linear', distribution='uniform'))
        if depth < 1:
            raise ValueError(f'the decoder needs a depth of at least 1, got {depth}: without a block no mask token '
                             'sees the image.')
        if embed_dims % 4 or embed_dims % num_heads:
            raise ValueError(f'embed_dims={embed_dims} of the decoder must be a multiple of 4 (sin-cos positions) and '
                             f'of num_heads={num_heads}.')
        self._positions: dict[tuple, Tensor] = {}
        self.embed = nn.Linear(in_channels, embed_dims)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        norm = dict(type='LN', eps=1e-6)
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(embed_dims, num_heads, 4 * embed_dims, norm_cfg=norm) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self.predict = nn.Linear(embed_dims, out_channels)

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def _position(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        key = grid, like.device, like.dtype
        if key not in self._positions:
            self._positions[key] = sincos_positions(grid, like.shape[-1]).to(like)
        return self._positions[key]

    def forward(self, extra: Tensor, patches: Tensor, keep_ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        Args:
            extra: (B, E, in_channels) extra tokens, which help and are not predicted.
            patches: (B, K, in_channels) encoded patches.
            keep_ids: (B, K) where they are in the image.
            grid: rows and columns of patches of the image.

        Returns:
            (B, N, out_channels), a prediction for every patch.
        """
        num_patches = grid[0] * grid[1]
        full = scatter_tokens(self.embed(patches), keep_ids, num_patches)
        seen = torch.zeros_like(full[..., :1], dtype=torch.bool).scatter_(1, keep_ids.unsqueeze(-1), True)
        full = torch.where(seen, full, self.mask_token.to(full.dtype))
        full = full + self._position(grid, full)
        tokens = torch.cat([self.embed(extra), full], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.predict(self.norm(tokens[:, extra.shape[1]:]))
