"""What is read from a ViT, and what comes back: the contract between models, masker and losses.

Taps are declared before the forward as ``{layer: {kinds}}``, so that a model runs exactly as deep as needed. Layers
count from 0, as mmpretrain's ``out_indices``. Kinds:

- ``hidden``: the block's output,
- ``q``, ``k``, ``v``: queries, keys and values of its attention, heads side by side in the channels,
- ``features``: the last block's output after the final norm.

Every tapped tensor is (B, E + N, C), the E extra tokens (CLS, registers) first.
"""
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import gather_tokens

Taps = Mapping[int, frozenset[str]]


@dataclass(frozen=True)
class ViTSpec:
    """The facts of a plain ViT that wiring needs."""

    embed_dims: int
    depth: int
    num_heads: int
    patch_size: int
    num_extra_tokens: int = 1
    class_token: bool = True

    @property
    def has_class_token(self) -> bool:
        """Whether the first of its extra tokens is a class token."""
        return self.class_token and self.num_extra_tokens > 0

    def layer(self, index: int, owner: str) -> int:
        """``index`` counted from 0; negative ones count from the end. ``owner`` names the model in the error."""
        if not -self.depth <= index < self.depth:
            raise ValueError(f'layer {index} is out of range for the {owner}, which has {self.depth} layers: layers '
                             f'count from 0, so choose 0 to {self.depth - 1}.')
        return index % self.depth


@dataclass
class ViTOutput:
    """What was tapped from one forward.

    Attributes:
        taps: (layer, kind) -> (B, E + K, C).
        num_extra_tokens: E.
        grid: rows and columns of patches of the full image.
        keep_ids: layer -> (B, K) patch indices of the full image that the layer saw, or None where it saw all.
    """

    taps: dict[tuple[int, str], Tensor]
    num_extra_tokens: int
    grid: tuple[int, int]
    keep_ids: dict[int, Tensor | None] = field(default_factory=dict)

    def extra(self, layer: int, kind: str) -> Tensor:
        """Extra tokens, (B, E, C)."""
        return self.taps[layer, kind][:, :self.num_extra_tokens]

    def patches(self, layer: int, kind: str, keep_ids: Tensor | None = None,
                grid: tuple[int, int] | None = None) -> Tensor:
        """Patch tokens, (B, K, C): those of ``keep_ids``, or all that the layer saw if None.

        Args:
            keep_ids: indices in ``grid``.
            grid: another grid than its own, to which all patches are resampled, bilinearly: relations of resampled q
                and k are the resampled relations.
        """
        patches = self.taps[layer, kind][:, self.num_extra_tokens:]
        own = self.keep_ids.get(layer)
        if grid is not None and grid != self.grid:
            if own is not None or keep_ids is not None:
                own_grid, other = ('x'.join(map(str, sides)) for sides in (self.grid, grid))
                raise ValueError(f'tokens were dropped, so a grid of {own_grid} patches cannot be resampled to one of '
                                 f"{other}: leave the teacher's image_size out, or train without a masker "
                                 '(masker=None, and no RedundantTokenMasker hook).')
            image = patches.transpose(1, 2).unflatten(2, self.grid)
            return F.interpolate(image, grid, mode='bilinear').flatten(2).transpose(1, 2)
        if keep_ids is None or own is keep_ids:
            return patches
        if own is None:
            return gather_tokens(patches, keep_ids)
        if not torch.equal(own, keep_ids):
            raise ValueError(f'layer {layer} saw other tokens than the ones asked for; only a model that saw the full '
                             'image can be read at any token.')
        return patches


def merge_taps(parts: Iterable[Taps]) -> Taps:
    """Union of several declarations."""
    merged: dict[int, frozenset[str]] = {}
    for part in parts:
        for layer, kinds in part.items():
            merged[layer] = merged.get(layer, frozenset()) | kinds
    return merged
