"""Position embeddings of a grid of patches."""
import torch
import torch.nn.functional as F
from torch import Tensor

POSITION_RULES = ('bicubic', 'bicubic-antialias', 'bicubic-offset', 'bilinear-corners', 'sincos')


def resample_positions(positions: Tensor, source: tuple[int, int], target: tuple[int, int],
                       rule: str = 'bicubic') -> Tensor:
    """Patch positions (1, h w, C) of grid ``source`` for grid ``target``, in float32.

    Authors differ in the rule, and so by up to 0.3 in value:

    - ``bicubic``: MAE, DeiT;
    - ``bicubic-antialias``: with a low-pass filter before shrinking: open_clip, timm, DINOv2 with registers;
    - ``bicubic-offset``: sampled at steps of ``source / (target + 0.1)``, a guard against rounding: DINO, DINOv2;
    - ``bilinear-corners``: the outermost positions stay where they are: big_vision (SigLIP);
    - ``sincos``: nothing is resampled, the embedding is computed anew: MoCo v3, :func:`sincos_positions`.
    """
    if source == target:
        return positions
    if rule == 'sincos':
        return sincos_positions(target, positions.shape[-1]).to(positions)
    image = positions.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    if rule == 'bicubic-offset':
        image = F.interpolate(image, scale_factor=[(t + 0.1) / s for t, s in zip(target, source)], mode='bicubic')
    elif rule == 'bilinear-corners':
        image = F.interpolate(image, target, mode='bilinear', align_corners=True)
    else:
        image = F.interpolate(image, target, mode='bicubic', antialias=rule == 'bicubic-antialias')
    return image.flatten(2).transpose(1, 2).to(positions.dtype)


def sincos_positions(grid: tuple[int, int], channels: int) -> Tensor:
    """The fixed embedding of MoCo v3 (arXiv 2104.02057), (1, h w, C): sine and cosine of the row, then of the column.

    Frequencies are ``10000^(-4 i / C)`` for i < C / 4.
    """
    if channels % 4:
        raise ValueError(f'sin-cos positions need a multiple of 4 channels, got {channels}.')
    frequencies = 10000.0**(-torch.arange(channels // 4, dtype=torch.float32) / (channels // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing='ij')
    angles = [index.reshape(-1, 1) * frequencies for index in (rows, columns)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).unsqueeze(0)
