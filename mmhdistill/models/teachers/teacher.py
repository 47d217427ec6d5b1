from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from mmengine.dist import broadcast
from mmengine.logging import MMLogger
from torch import Tensor, nn

from ..taps import Taps, ViTOutput, ViTSpec
from .card import check_normalisation
from .receipt import Receipt


class Teacher(nn.Module):
    """A frozen ViT that is fed the student's images; the base of all teachers.

    Frozen means: always in eval mode, no gradient, and, held by the distiller in ``FrozenTeachers``, outside the module
    tree. Images are re-normalised to its own mean and std and resized so that its patch grid is the student's, or, with
    ``image_size``, to a size of its own: losses then resample the student's tokens to the teacher's grid.

    A subclass sets :attr:`spec`, :attr:`checkpoint` (None for random weights) and :attr:`model_name`, calls
    :meth:`_set_normalisation`, and has ``_encode(images, taps)``, ``_load()``, ``_flops(...)`` and two notes for the
    receipt.

    Args:
        name: in messages; given by the distiller.
        input_mean, input_std: normalisation of the images it will be fed, RGB in 0-255; given by the distiller.
        image_size: side, or (height, width), that it sees images at; None follows the student's grid.
        dtype: ``float32``, ``bfloat16`` or ``float16`` of its matrix products, by autocast; None: the training's.
    """

    # Whether it is fed only the patches that the masker keeps.
    masked = False

    spec: ViTSpec
    checkpoint: str | None
    model_name: str

    def __init__(self, name: str = 'teacher', input_mean: list[float] | None = None,
                 input_std: list[float] | None = None, image_size: int | tuple[int, int] | None = None,
                 dtype: str | None = None):
        super().__init__()
        if dtype not in (None, 'float32', 'bfloat16', 'float16'):
            raise ValueError(f"teacher '{name}' has dtype {dtype!r}: choose float32, bfloat16 or float16, or None for "
                             "the training's.")
        self.dtype = dtype
        self.name = name
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.receipt: Receipt | None = None
        self._input = input_mean, input_std
        self._loaded = False
        self._notes: set[str] = set()

    def _set_normalisation(self, mean: list[float], std: list[float]) -> None:
        check_normalisation(mean, std, f"teacher '{self.name}'")
        self.mean, self.std = list(mean), list(std)
        own_mean, own_std = (torch.tensor(x).view(-1, 1, 1) for x in (self.mean, self.std))
        input_mean, input_std = (own if given is None else torch.tensor(given).view(-1, 1, 1)
                                 for own, given in zip((own_mean, own_std), self._input))
        # (x std + mean - own_mean) / own_std, as one multiply-add.
        self.register_buffer('scale', (input_std / own_std).expand(3, 1, 1).clone(), persistent=False)
        self.register_buffer('shift', ((input_mean - own_mean) / own_std).expand(3, 1, 1).clone(), persistent=False)
        self._renormalises = not (torch.equal(own_mean, input_mean) and torch.equal(own_std, input_std))

    def train(self, mode: bool = True) -> 'Teacher':
        """Stays in eval mode: a live drop path would make the target noisy."""
        return super().train(False)

    def grid(self, student_grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches that it cuts an image into which the student cuts into ``student_grid``."""
        if self.image_size is None:
            return tuple(student_grid)
        patch = self.spec.patch_size
        if any(side < patch or side % patch for side in self.image_size):
            size = 'x'.join(map(str, self.image_size))
            raise ValueError(f"teacher '{self.name}' cannot cut images of {size} px into patches of {patch} px: give "
                             f'image_size multiples of {patch}.')
        return tuple(side // patch for side in self.image_size)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int], taps: Taps, keep_ids: Tensor | None = None) -> ViTOutput:
        """
        Args:
            images: (B, 3, H, W), normalised by ``input_mean`` and ``input_std``.
            grid: rows and columns of patches that the student cuts the images into.
            taps: what to read; the teacher runs no deeper.
            keep_ids: (B, K) patches that it is fed, where it is ``masked``; None feeds all.
        """
        if not self._loaded:
            raise RuntimeError(f"teacher '{self.name}' has no weights yet: call init_weights() on the model first (a "
                               'Runner does), or build it with checkpoint=None for random weights.')
        if self._renormalises:
            images = images * self.scale + self.shift
        own = self.grid(grid)
        size = tuple(side * self.spec.patch_size for side in own)
        if tuple(images.shape[-2:]) != size:
            self._note(f"teacher '{self.name}' sees images resized from {tuple(images.shape[-2:])} to {size}, "
                       f'{own[0]}x{own[1]} patches of {self.spec.patch_size} px')
            images = F.interpolate(images, size, mode='bicubic', antialias=True)
        with self._autocast(images.device.type):
            return self._encode(images, taps) if keep_ids is None else self._encode(images, taps, keep_ids)

    def _autocast(self, device: str) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        if self.dtype == 'float32':
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, getattr(torch, self.dtype))

    def load(self) -> Receipt:
        """Load the weights strictly, once; the receipt says where they are from."""
        if self.checkpoint is None and self.receipt is None:
            MMLogger.get_current_instance().warning(
                f"teacher '{self.name}' has random weights (checkpoint=None): good for trying things out only")
            # Each process has drawn its own, and teachers are in no state that a Runner makes equal.
            for weight in self.state_dict().values():
                broadcast(weight)
            self.receipt = Receipt(name=self.name, model=self.model_name, source='random weights', matched=0,
                                   total=len(self.state_dict()), mean=self.mean, std=self.std)
        if not self._loaded:
            self.receipt = self._load()
            self._loaded = True
            self.requires_grad_(False).train()
        return self.receipt

    def describe_run(self, student_grid: tuple[int, int], taps: Taps, kept: int | None = None) -> dict:
        """How it will be run on images that the student cuts into ``student_grid``; for the receipt.

        Args:
            kept: patches that it is fed of them, where it is ``masked``.
        """
        grid = self.grid(student_grid)
        tokens = self.spec.num_extra_tokens + (kept or grid[0] * grid[1])
        deepest = max(taps)
        return dict(
            grid=list(grid),
            image_size=[side * self.spec.patch_size for side in grid],
            extra_tokens=self._extra_tokens(),
            positions=self._positions_note(grid),
            deepest_layer=deepest,
            depth=self.spec.depth,
            gflops=self._flops(grid[0] * grid[1], tokens, taps) / 1e9)

    def _note(self, message: str) -> None:
        if message not in self._notes:
            self._notes.add(message)
            MMLogger.get_current_instance().info(message)

    def _encode(self, images: Tensor, taps: Taps) -> ViTOutput:
        raise NotImplementedError

    def _load(self) -> Receipt:
        raise NotImplementedError
