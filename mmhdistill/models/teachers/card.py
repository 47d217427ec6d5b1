import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ...functional import POSITION_RULES, resample_positions

_ACTIVATIONS = dict(gelu=dict(type='GELU'), gelu_tanh=dict(type='GELU', approximate='tanh'),
                    quick_gelu=dict(type='mmpretrain.QuickGELU'))


@dataclass(frozen=True)
class TeacherCard:
    """A plain ViT and where its weights come from: everything that differs between public teachers, as data.

    Attributes:
        mean, std: of the images that it was trained on, RGB in 0-255.
        img_size: side of the square image that its position embedding was made for.
        mlp_ratio: hidden width of the MLP over ``embed_dims``.
        class_token: whether it has one; the first of its extra tokens.
        registers: further learned tokens between the class token and the patches (DINOv2's registers, DeiT's
            distillation token).
        pre_norm: LayerNorm before the first block and no bias in the patch embedding (CLIP).
        activation: ``gelu``, ``gelu_tanh`` or ``quick_gelu``.
        swiglu: gated MLP of DINOv2 g.
        layer_scale: learned factors of the residual branches.
        resampling: rule of its authors' own code for another patch grid; see
            :func:`mmhdistill.functional.resample_positions`.
        format: of the published file; what a file is in, is seen from its keys.
        url: of the file that its authors published.
        sha256, md5: of that file, or the published beginning.
        licence: of the weights.
    """

    name: str
    embed_dims: int
    depth: int
    num_heads: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int = 224
    mlp_ratio: float = 4.0
    class_token: bool = True
    registers: int = 0
    pre_norm: bool = False
    activation: str = 'gelu'
    swiglu: bool = False
    layer_scale: bool = False
    norm_eps: float = 1e-6
    resampling: str = 'bicubic'
    format: str = ''
    url: str | None = None
    sha256: str | None = None
    md5: str | None = None
    licence: str = ''

    def __post_init__(self):
        for name, choices in (('activation', _ACTIVATIONS), ('resampling', POSITION_RULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"teacher card '{self.name}' has {name} '{getattr(self, name)}': choose one of "
                                 f'{", ".join(choices)}.')
        for name in ('embed_dims', 'depth', 'num_heads', 'patch_size', 'img_size'):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"teacher card '{self.name}' has {name} {getattr(self, name)!r}: give a whole number.")
        if self.embed_dims % self.num_heads:
            raise ValueError(f"teacher card '{self.name}' has {self.num_heads} heads, which do not divide its width of "
                             f'{self.embed_dims}.')
        if self.img_size < self.patch_size:
            raise ValueError(f"teacher card '{self.name}' has images of {self.img_size} px, smaller than one patch of "
                             f'{self.patch_size} px.')
        check_normalisation(self.mean, self.std, f"teacher card '{self.name}'")
        if not isinstance(self.registers, int) or self.registers < 0:
            raise ValueError(f"teacher card '{self.name}' has registers {self.registers!r}: give a whole number.")
        if self.registers and not self.class_token:
            raise ValueError(f"teacher card '{self.name}' has registers and no class token, which no known ViT has.")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches that its position embedding was made for."""
        return (self.img_size // self.patch_size, ) * 2

    @property
    def num_extra_tokens(self) -> int:
        return self.class_token + self.registers

    def backbone(self) -> dict:
        """Config of the ``mmpretrain.VisionTransformer`` that it is; its registers are not in it."""
        return dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(
                embed_dims=self.embed_dims,
                num_layers=self.depth,
                num_heads=self.num_heads,
                feedforward_channels=round(self.embed_dims * self.mlp_ratio)),
            img_size=self.grid[0] * self.patch_size,
            patch_size=self.patch_size,
            out_type='raw',
            with_cls_token=self.class_token,
            pre_norm=self.pre_norm,
            norm_cfg=dict(type='LN', eps=self.norm_eps),
            # The value is the file's.
            layer_scale_init_value=1.0 if self.layer_scale else 0.0,
            layer_cfgs=dict(
                act_cfg=_ACTIVATIONS[self.activation], ffn_type='swiglu_fused' if self.swiglu else 'origin'))

    def build(self) -> VisionTransformer:
        """The model. Registers lie behind the class token in ``cls_token``, (1, E, C), and ``pos_embed``."""
        vit = MODELS.build(self.backbone())
        if self.registers:
            vit.num_extra_tokens = self.num_extra_tokens
            vit.cls_token = nn.Parameter(torch.zeros(1, self.num_extra_tokens, self.embed_dims))
            vit.pos_embed = nn.Parameter(
                torch.zeros(1, self.num_extra_tokens + math.prod(self.grid), self.embed_dims))
        return vit

    def positions(self, pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
        """``pos_embed`` (1, E + N, C) for another grid, as the authors' own code makes it."""
        if grid == self.grid:
            return pos_embed
        extra, patches = pos_embed[:, :self.num_extra_tokens], pos_embed[:, self.num_extra_tokens:]
        patches = resample_positions(patches, self.grid, grid, self.resampling)
        return torch.cat([extra, patches], dim=1)


def check_normalisation(mean: Sequence[float], std: Sequence[float], owner: str) -> None:
    """Raise ValueError unless they can be those of RGB images in 0-255."""
    if not all(isinstance(values, Sequence) and len(values) == 3 and all(map(_is_number, values))
               for values in (mean, std)):
        raise ValueError(f'{owner} has mean {mean} and std {std}: give three numbers each, for R, G and B.')
    if min(std) < 1 or 0 < max(mean) <= 1:
        given = ' and '.join(f'{name} {", ".join(f"{x:g}" for x in values)}'
                             for name, values in (('mean', mean), ('std', std)))
        raise ValueError(f'{owner} has {given}, as for images in 0-1: give mean and std of images in 0-255, 255 times '
                         'as large.')


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def make_card(card: dict) -> TeacherCard:
    """A card from a dict of its fields."""
    known = {field.name for field in fields(TeacherCard)}
    required = {'name', 'embed_dims', 'depth', 'num_heads', 'patch_size', 'mean', 'std'}
    if unknown := set(card) - known:
        raise ValueError(f'a teacher card has no fields {sorted(unknown)}: the fields are {sorted(known)}.')
    if missing := required - set(card):
        raise ValueError(f'the teacher card lacks {sorted(missing)}: give them, as RGB in 0-255 for mean and std.')
    return TeacherCard(**card)
