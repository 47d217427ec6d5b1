"""Between the student's features and a feature loss; thrown away after pre-training."""
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS


@MODELS.register_module()
class LinearProjector(BaseModule):
    """One linear layer, (B, N, in_channels) -> (B, N, out_channels)."""

    def __init__(self, in_channels: int, out_channels: int, init_cfg: dict | None = None):
        super().__init__(init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02))
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@MODELS.register_module()
class MLPProjector(BaseModule):
    """Linear - GELU - Linear, (B, N, in_channels) -> (B, N, out_channels) [choice].

    Args:
        hidden_channels: width between; ``out_channels`` if None.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int | None = None,
                 init_cfg: dict | None = None):
        super().__init__(init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02))
        hidden_channels = hidden_channels or out_channels
        self.layers = nn.Sequential(
            nn.Linear(in_channels, hidden_channels), nn.GELU(), nn.Linear(hidden_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
