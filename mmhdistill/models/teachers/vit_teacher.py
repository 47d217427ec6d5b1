from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...registry import MODELS
from ..flops import encoder_flops
from ..taps import Taps, ViTOutput
from ..vit import encode, ready_to_compile, run_block, vit_spec
from .card import TeacherCard
from .cards import find_card
from .loading import WeightFile
from .receipt import Receipt
from .teacher import Teacher


@MODELS.register_module()
class ViTTeacher(Teacher):
    """A frozen plain ViT, described by a card and loaded strictly from the file that its authors published.

    Args:
        card: name of a shipped card, or a dict of :class:`TeacherCard`'s fields.
        checkpoint: ``'auto'`` fetches the file that the card names; else a path or URL; None keeps random weights, for
            tests. The file's format is recognised by its keys.
        sha256: published hash of ``checkpoint``, or its beginning; for ``'auto'`` the card's.
        entry: the dict in the file to read, for example ``model_ema``; by default ``state_dict``, ``model`` or
            ``teacher``.
        prefix: of the ViT's keys, where a file holds more than one, for example ``module.momentum_encoder.``.
        masked: feed it only the patches that the masker keeps, as a masked autoencoder was in its own training: less
            arithmetic, other relations. Off by default, as the paper's teachers see the full image.
        compile: run its blocks by ``torch.compile``, which takes time once; what it gains has not been measured.
        name, input_mean, input_std, image_size, dtype: see :class:`Teacher`.
    """

    def __init__(self, card: str | dict | TeacherCard, checkpoint: str | None = 'auto', sha256: str | None = None,
                 entry: str | None = None, prefix: str | None = None, masked: bool = False, compile: bool = False,
                 **kwargs):
        super().__init__(**kwargs)
        self.card = find_card(card)
        if masked and self.image_size is not None:
            raise ValueError(f"teacher '{self.name}' is masked, so it has the student's grid of patches: leave its "
                             'image_size out.')
        self.masked = masked
        self._run_block = torch.compile(run_block) if compile else None
        self.checkpoint, self.model_name = checkpoint, self.card.name
        self._file = WeightFile(self.card, checkpoint, sha256, entry, prefix)
        # Without memory until the weights are there: they are never held twice.
        with torch.device('cpu' if checkpoint is None else 'meta'):
            self.vit = ready_to_compile(self.card.build())
        self.spec = replace(vit_spec(self.vit), class_token=self.card.class_token)
        self._set_normalisation(self.card.mean, self.card.std)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self.requires_grad_(False)
        self.train()
        self._loaded = checkpoint is None

    def _encode(self, images: Tensor, taps: Taps, keep_ids: Tensor | None = None) -> ViTOutput:
        reduce = None if keep_ids is None else lambda index, recorded: keep_ids if index == 0 else None
        return encode(self.vit, images, taps, reduce, self._position, self._run_block)

    def _position(self, grid: tuple[int, int]) -> Tensor:
        if grid not in self._positions:
            if grid != self.card.grid:
                self._note(f"teacher '{self.name}' has its position embedding {self._positions_note(grid)}")
            self._positions[grid] = self.card.positions(self.vit.pos_embed, grid)
        return self._positions[grid]

    def _apply(self, fn: Callable, recurse: bool = True):
        self._positions = {}
        # Before loading, only the normalisation is there to be moved; the weights then follow it.
        return super()._apply(fn, recurse=recurse and self._loaded)

    def _load(self) -> Receipt:
        tensors, receipt = self._file.read(self.name, self.scale.dtype)
        for key, tensor in tensors:
            tensor = tensor.to(self.scale.device, self.scale.dtype)
            if tensor.untyped_storage().nbytes() > tensor.nbytes or not tensor.is_contiguous():
                # A part of a larger tensor would keep the whole in memory.
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            module, _, leaf = key.rpartition('.')
            setattr(self.vit.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        return receipt

    def _extra_tokens(self) -> str:
        registers = f' + {self.card.registers} register' if self.card.registers else ''
        return f'1 class{registers}' if self.card.class_token else 'none'

    def _positions_note(self, grid: tuple[int, int]) -> str:
        if tuple(grid) == self.card.grid:
            return 'as trained'
        how = 'computed anew' if self.card.resampling == 'sincos' else 'resampled'
        return (f'{how} from {"x".join(map(str, self.card.grid))} to {"x".join(map(str, grid))} patches '
                f'({self.card.resampling})')

    def _flops(self, patches: int, tokens: int, taps: Taps) -> int:
        return encoder_flops(self.vit.patch_embed, self.vit.layers, self.spec.embed_dims, patches,
                             [tokens] * self.spec.depth, taps)
