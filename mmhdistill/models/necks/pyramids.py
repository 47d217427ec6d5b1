"""Feature pyramids for a plain ViT, whose maps all have the stride of a patch."""
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.models.utils import LayerNorm2d
from torch import Tensor, nn

from ...registry import MODELS


@MODELS.register_module()
class DeconvPyramid(BaseModule):
    """Four maps of a ViT -> four of strides 4, 8, 16 and 32 (for patches of 16), for a FPN or UperNet to follow.

    The first two are upsampled by deconvolutions, the third stays, the last is max-pooled: BEiT's and CAE's (arXiv
    2202.03026) pyramid. The norm between the deconvolutions is a LayerNorm, which any batch size can train [choice].

    Args:
        in_channels: width of the ViT.
    """

    def __init__(self, in_channels: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.scales = nn.ModuleList([
            nn.Sequential(_double(in_channels, in_channels), _norm(in_channels), nn.GELU(),
                          _double(in_channels, in_channels)),
            _double(in_channels, in_channels), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(B, C, h, w) each -> (B, C, 4 h, 4 w), (B, C, 2 h, 2 w), (B, C, h, w), (B, C, h // 2, w // 2)."""
        if len(inputs) != len(self.scales):
            raise ValueError(f'{len(self.scales)} maps of the ViT are expected, got {len(inputs)}: give the backbone '
                             f'{len(self.scales)} out_indices.')
        return tuple(scale(x) for scale, x in zip(self.scales, inputs))


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """The last map of a ViT -> a pyramid with no lateral connections (ViTDet, arXiv 2203.16527).

    Args:
        in_channels: width of the ViT.
        out_channels: of every map.
        num_outs: 4 maps of strides 4, 8, 16 and 32 (for patches of 16), and further ones each subsampled by 2.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, num_outs: int = 5, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if num_outs < 4:
            raise ValueError(f'num_outs={num_outs}: the pyramid has at least 4 maps.')
        half, quarter = in_channels // 2, in_channels // 4
        self.scales = nn.ModuleList([
            nn.Sequential(_double(in_channels, half), _norm(half), nn.GELU(), _double(half, quarter)),
            _double(in_channels, half), nn.Identity(), nn.MaxPool2d(2)])
        self.convs = nn.ModuleList([
            nn.Sequential(nn.Conv2d(width, out_channels, 1, bias=False), _norm(out_channels),
                          nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), _norm(out_channels))
            for width in (quarter, half, in_channels, in_channels)])
        self.num_outs = num_outs

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(B, C, h, w), the last of ``inputs`` -> ``num_outs`` maps (B, out_channels, ...), finest first."""
        maps = [conv(scale(inputs[-1])) for scale, conv in zip(self.scales, self.convs)]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return tuple(maps)


def _double(in_channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)


def _norm(channels: int) -> nn.Module:
    # The eps of Detectron2's ViTDet.
    return LayerNorm2d(channels, eps=1e-6)
