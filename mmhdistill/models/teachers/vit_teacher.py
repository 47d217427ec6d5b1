from collections import Counter

import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from ...registry import MODELS
from ..taps import Taps, ViTOutput, ViTSpec
from ..vit import encode, vit_spec
from .cards import TeacherCard, find_card
from .files import existing_file, fetch, read_tensors, sha256
from .formats import FORMATS, recognise


@MODELS.register_module()
class ViTTeacher(nn.Module):
    """A frozen plain ViT that is fed the student's images.

    Frozen means: always in eval mode, no gradient, and, held by the distiller in ``FrozenTeachers``, outside the module
    tree. Images are re-normalised to its own mean and std and resized so that its patch grid is the student's.

    Args:
        card: name of a shipped card, or a dict of :class:`TeacherCard`'s fields.
        checkpoint: ``'auto'`` fetches the file that the card names; else a path or URL; None keeps random weights, for
            tests. mmpretrain, timm (MAE, DINO, DeiT), MoCo v3 and OpenAI CLIP files are recognised by their keys.
        name: in messages; given by the distiller.
        input_mean, input_std: normalisation of the images it will be fed, RGB in 0-255; given by the distiller.
    """

    def __init__(self, card: str | dict | TeacherCard, checkpoint: str | None = 'auto', name: str = 'teacher',
                 input_mean: list[float] | None = None, input_std: list[float] | None = None):
        super().__init__()
        self.card = find_card(card)
        self.name = name
        self.checkpoint = checkpoint
        self.vit = MMPRETRAIN_MODELS.build(self.card.backbone())
        self.requires_grad_(False)
        self.train()
        self._loaded = checkpoint is None
        self._notes: set[str] = set()
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (self.card.mean, self.card.std))
        own_mean, own_std = mean, std
        if input_mean is not None:
            mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (input_mean, input_std))
        # (x std + mean - own_mean) / own_std, as one multiply-add.
        self.register_buffer('scale', (std / own_std).expand(3, 1, 1).clone(), persistent=False)
        self.register_buffer('shift', ((mean - own_mean) / own_std).expand(3, 1, 1).clone(), persistent=False)
        self._renormalises = not (torch.equal(own_mean, mean) and torch.equal(own_std, std))

    @property
    def spec(self) -> ViTSpec:
        return vit_spec(self.vit)

    def train(self, mode: bool = True) -> 'ViTTeacher':
        """Stays in eval mode: a live drop path would make the target noisy."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int], taps: Taps) -> ViTOutput:
        """
        Args:
            images: (B, 3, H, W), normalised by ``input_mean`` and ``input_std``.
            grid: rows and columns of patches that the student cuts the images into.
            taps: what to read; the teacher runs no deeper.
        """
        if not self._loaded:
            raise RuntimeError(f"teacher '{self.name}' has no weights yet: call init_weights() on the model first (a "
                               'Runner does), or build it with checkpoint=None for random weights.')
        if self._renormalises:
            images = images * self.scale + self.shift
        size = tuple(side * self.card.patch_size for side in grid)
        if tuple(images.shape[-2:]) != size:
            self._note(f"teacher '{self.name}' sees images resized from {tuple(images.shape[-2:])} to {size}, so that "
                       f"its patches of {self.card.patch_size} px make the student's {grid[0]}x{grid[1]} grid")
            images = F.interpolate(images, size, mode='bicubic', antialias=True)
        if grid != self.vit.patch_resolution:
            self._note(f"teacher '{self.name}' has its position embedding resampled from "
                       f'{tuple(self.vit.patch_resolution)} to {grid} patches ({self.vit.interpolate_mode})')
        return encode(self.vit, images, taps)

    def load(self) -> None:
        """Load ``checkpoint`` strictly, once, and print the receipt."""
        if self.checkpoint is None:
            MMLogger.get_current_instance().warning(
                f"teacher '{self.name}' has random weights (checkpoint=None): good for trying things out only")
        if self._loaded:
            return
        path, expected = self._locate()
        digest = sha256(path)
        if expected and not digest.startswith(expected):
            raise ValueError(f"{path} has sha256 {digest}, but card '{self.card.name}' expects {expected}: the file is "
                             'damaged or another one. Delete it to fetch it again, or give the right one.')
        state = read_tensors(path)
        fmt = recognise(state)
        if fmt is None:
            raise ValueError(f'{path} is in no known format: expected the keys of one of '
                             f'{", ".join(f.name for f in FORMATS)}; found {", ".join(list(state)[:3])}, ...')
        ours, aside = fmt.convert(state)
        own = self.vit.state_dict()
        _check_strict(path, self.card, own, ours)
        for key, tensor in own.items():
            tensor.copy_(ours[key])
        self._loaded = True
        left = Counter(name.split('.')[0] + '.*' if '.' in name else name for name in aside)
        left = ', '.join(f'{name} ({count})' for name, count in left.items()) or 'nothing'
        licence = f', licence {self.card.licence}' if self.card.licence else ''
        MMLogger.get_current_instance().info(
            f"teacher '{self.name}': {self.card.name} from {path} ({fmt.name} format{licence}), {len(own)}/{len(own)} "
            f'tensors, sha256 {digest}; left aside: {left}')

    def _locate(self) -> tuple[str, str | None]:
        """Path of the weight file and the sha256 it must have."""
        if self.checkpoint == 'auto':
            if self.card.url is None:
                raise ValueError(f"card '{self.card.name}' names no URL: set checkpoint of teacher '{self.name}' to "
                                 'the path of its weight file.')
            return str(fetch(self.card.url, self.card.sha256)), self.card.sha256
        if '://' in self.checkpoint:
            return str(fetch(self.checkpoint)), None
        return str(existing_file(self.checkpoint)), None

    def _note(self, message: str) -> None:
        if message not in self._notes:
            self._notes.add(message)
            MMLogger.get_current_instance().info(message)


def _check_strict(path: str, card: TeacherCard, own: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    missing = [key for key in own if key not in ours]
    unexpected = [key for key in ours if key not in own]
    shapes = [f'{key} is {tuple(ours[key].shape)} instead of {tuple(own[key].shape)}'
              for key in own if key in ours and ours[key].shape != own[key].shape]
    problems = [f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
                for what, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes))
                if names]
    if problems:
        raise ValueError(f"{path} does not fit card '{card.name}' ({card.depth} layers of width {card.embed_dims}, "
                         f'patch {card.patch_size}): {"; ".join(problems)}. Nothing was loaded; give the file of this '
                         'card, or the card of this file.')
