import os
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from ...registry import MODELS
from ..flops import encoder_flops
from ..taps import Taps, ViTOutput
from ..vit import encode, vit_spec
from .card import TeacherCard
from .cards import find_card
from .fetch import Mismatch, check_digest, fetch
from .files import existing_file, read_tensors
from .formats import Plan, assemble, plan, recognise
from .receipt import Receipt, dtype_note
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
        name, input_mean, input_std, image_size: see :class:`Teacher`.
    """

    def __init__(self, card: str | dict | TeacherCard, checkpoint: str | None = 'auto', sha256: str | None = None,
                 entry: str | None = None, prefix: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.card = find_card(card)
        self.checkpoint = checkpoint
        self._source = dict(sha256=sha256, entry=entry, prefix=prefix)
        # Without memory until the weights are there: they are never held twice.
        with torch.device('cpu' if checkpoint is None else 'meta'):
            self.vit = self.card.build()
        self.spec = vit_spec(self.vit)
        self._set_normalisation(self.card.mean, self.card.std)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self.requires_grad_(False)
        self.train()
        self._loaded = checkpoint is None

    def _encode(self, images: Tensor, taps: Taps) -> ViTOutput:
        return encode(self.vit, images, taps, positions=self._position)

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

    def load(self) -> Receipt | None:
        if self.checkpoint is None:
            MMLogger.get_current_instance().warning(
                f"teacher '{self.name}' has random weights (checkpoint=None): good for trying things out only")
            return self.receipt
        return super().load()

    def _load(self) -> Receipt:
        path, required, known = self._locate()
        try:
            digest = check_digest(path, **known)
            published = any(known.values()) or None
        except Mismatch as error:
            if required:
                raise ValueError(f"{path} {error} (card '{self.card.name}'). Delete it to fetch it again, or give the "
                                 'right one.') from error
            digest, published = check_digest(path), False
        weights = read_tensors(path, self._source['entry'])
        try:
            fmt, prefix = recognise(weights.tensors, self._source['prefix'])
        except ValueError as error:
            raise ValueError(f'{path} {error}') from error
        own = self.vit.state_dict()
        fit = plan(fmt, prefix, weights.tensors, own, self.card.registers)
        self._check(path, fit, own, weights.tensors)
        dtypes = {weights.tensors[name].dtype for name in fit.used}
        for key in own:
            self._place(key, [weights.tensors.pop(name) for name in fit.sources[key]])
        return Receipt(
            name=self.name, model=self.card.name, source=str(path), matched=len(own), total=len(own),
            mean=self.mean, std=self.std, format=fmt.name, prefix=prefix, entry=weights.entry,
            unused=fit.aside + weights.beside, sha256=digest, published=published,
            dtype=dtype_note(dtypes, self.scale.dtype), licence=self.card.licence)

    def _place(self, key: str, parts: list[Tensor]) -> None:
        """Put one tensor into the model, as a copy of its own where it is a part of a larger one."""
        tensor = assemble(key, parts, self.card.num_extra_tokens).to(self.scale.device, self.scale.dtype)
        if tensor.untyped_storage().nbytes() > tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        module, _, leaf = key.rpartition('.')
        setattr(self.vit.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))

    def _locate(self) -> tuple[Path, bool, dict[str, str | None]]:
        """Path of the weight file, whether it must have the known hashes, and these.

        A file of the user's own may be another than the card's, for example the same weights as safetensors.
        """
        given = dict(sha256=self._source['sha256'])
        known = given if given['sha256'] else dict(sha256=self.card.sha256, md5=self.card.md5)
        if self.checkpoint == 'auto':
            if self.card.url is None:
                raise ValueError(f"card '{self.card.name}' names no URL: set checkpoint of teacher '{self.name}' to "
                                 'the path of its weight file.')
            return fetch(self.card.url, **known), True, known
        required = bool(given['sha256'])
        if '://' in self.checkpoint:
            return fetch(self.checkpoint, **given), required, known
        return existing_file(os.path.expanduser(self.checkpoint)), required, known

    def _check(self, path: Path, fit: Plan, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        shapes = []
        for key, expected in own.items():
            if not set(fit.sources[key]) <= set(tensors):
                continue
            try:
                found = tuple(assemble(key, [tensors[name].to('meta') for name in fit.sources[key]],
                                       self.card.num_extra_tokens).shape)
            except (RuntimeError, IndexError):
                found = 'of shapes ' + ', '.join(str(tuple(tensors[name].shape)) for name in fit.sources[key])
            if found != tuple(expected.shape):
                shapes.append(f'{" + ".join(fit.sources[key])} is {found} instead of {tuple(expected.shape)}')
        problems = [f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
                    for what, names in (('missing', fit.missing), ('unexpected', fit.unexpected),
                                        ('of another shape', shapes)) if names]
        if problems:
            card = self.card
            raise ValueError(f"{path} does not fit card '{card.name}' ({card.depth} layers of width {card.embed_dims}, "
                             f'patch {card.patch_size}): {"; ".join(problems)}. Nothing was loaded; give the file of '
                             'this card, or the card of this file.')

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
