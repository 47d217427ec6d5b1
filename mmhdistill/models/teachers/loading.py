"""Reading the file of a card: found, verified, recognised, matched, and given out tensor by tensor."""
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...functional import sincos_positions
from .card import TeacherCard
from .cards import CARDS
from .fetch import Mismatch, check_digest, fetch, verify
from .files import Weights, existing_file, read_tensors
from .formats import Plan, assemble, plan, recognise
from .receipt import Receipt, dtype_note

# Numbers of 8 bits mean nothing without the scales that belong to them.
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class WeightFile:
    """A card's weights: what its authors published, or another file that holds them.

    Attributes:
        checkpoint: ``'auto'`` fetches the file that the card names; else a path or URL.
        sha256: published hash of ``checkpoint``, or its beginning; by default the card's.
        entry: the dict in the file to read, see :func:`read_tensors`.
        prefix: of the ViT's keys, where a file holds more than one.
    """

    card: TeacherCard
    checkpoint: str | None = 'auto'
    sha256: str | None = None
    entry: str | None = None
    prefix: str | None = None

    def read(self, name: str, dtype: torch.dtype = torch.float32,
             role: str = 'teacher') -> tuple[Iterator[tuple[str, Tensor]], Receipt]:
        """Every tensor of the card's ``mmpretrain.VisionTransformer`` with its key, one at a time, and the receipt.

        What has been given out is not held any more. Raises before the first if anything does not fit.

        Args:
            name, role: whose weights they are, for messages.
            dtype: what the tensors will be turned into, for the receipt.
        """
        path, required, known = self._locate(f"{role} '{name}'")
        if required:
            digest = verify(path, self.checkpoint == 'auto' or '://' in self.checkpoint, **known)
            published = any(known.values()) or None
        else:
            digest, published = self._compare(path, known)
        weights = read_tensors(path, self.entry)
        try:
            fmt, prefix = recognise(weights.tensors, self.prefix)
        except ValueError as error:
            raise ValueError(f'{path} {error}') from error
        with torch.device('meta'):
            own = {key: tuple(x.shape) for key, x in self.card.build().state_dict().items()}
        fit = plan(fmt, prefix, weights.tensors, own, self.card.registers)
        self._check(path, fit, own, weights.tensors)
        self._check_sincos(path, weights.tensors, fit)
        dtypes = {weights.tensors[source].dtype for source in fit.used}
        receipt = Receipt(
            role=role, name=name, model=self.card.name, source=str(path), matched=len(own), total=len(own),
            mean=list(self.card.mean), std=list(self.card.std), format=fmt.name, prefix=prefix, entry=weights.entry,
            unused=fit.aside + weights.beside, sha256=digest, published=published, dtype=dtype_note(dtypes, dtype),
            licence=self.card.licence)
        return self._give_out(fit, weights), receipt

    def _compare(self, path: Path, known: dict[str, str | None]) -> tuple[str, bool | None]:
        """The sha256 of a file of the user's, and whether it is the published one; another card's file is refused."""
        try:
            digest, published = check_digest(path, **known), any(known.values()) or None
        except Mismatch:
            digest, published = check_digest(path), False
        # A card of the user's own that names no hash may well describe a shipped card's file.
        pinned_elsewhere = published is False or published is None and self.card.name in CARDS
        for other in CARDS.values():
            if pinned_elsewhere and other.sha256 and digest.startswith(other.sha256):
                raise ValueError(f"{path} is the file of card '{other.name}', and not of '{self.card.name}': give the "
                                 'file of this card, or that card.')
        return digest, published

    def _check_sincos(self, path: Path, tensors: dict[str, Tensor], fit: Plan) -> None:
        """A card whose positions are computed anew on other grids must have those very positions on its own."""
        if self.card.resampling != 'sincos':
            return
        found = assemble('pos_embed', [tensors[name] for name in fit.sources['pos_embed']], self.card.num_extra_tokens)
        expected = sincos_positions(self.card.grid, self.card.embed_dims)
        difference = (found[:, self.card.num_extra_tokens:].float() - expected).abs().max().item()
        if difference > 1e-2:  # bfloat16 rounds by 2e-3; another order or size differs by 1
            raise ValueError(f"{path} does not fit card '{self.card.name}': its positions differ by {difference:.3g} "
                             'from the fixed sin-cos embedding of this card. Nothing was loaded; give the card of this '
                             'file.')

    def _give_out(self, fit: Plan, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for key, sources in fit.sources.items():
            yield key, assemble(key, [weights.tensors.pop(source) for source in sources], self.card.num_extra_tokens)

    def _locate(self, owner: str) -> tuple[Path, bool, dict[str, str | None]]:
        """Path of the weight file, whether it must have the known hashes, and these.

        A file of the user's own may be another than the card's, for example the same weights as safetensors.
        """
        given = dict(sha256=self.sha256)
        known = given if self.sha256 else dict(sha256=self.card.sha256, md5=self.card.md5)
        if self.checkpoint == 'auto':
            if self.card.url is None:
                raise ValueError(f"card '{self.card.name}' names no URL: set checkpoint of {owner} to the path of its "
                                 'weight file.')
            return fetch(self.card.url, **known), True, known
        if '://' in self.checkpoint:
            return fetch(self.checkpoint, **given), bool(self.sha256), known
        return existing_file(os.path.expanduser(self.checkpoint)), bool(self.sha256), known

    def _check(self, path: Path, fit: Plan, own: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
        shapes = []
        for key, expected in own.items():
            if not set(fit.sources[key]) <= set(tensors):
                continue
            try:
                found = tuple(assemble(key, [tensors[name].to('meta') for name in fit.sources[key]],
                                       self.card.num_extra_tokens).shape)
            except (RuntimeError, IndexError):
                found = 'of shapes ' + ', '.join(str(tuple(tensors[name].shape)) for name in fit.sources[key])
            if found != expected:
                shapes.append(f'{" + ".join(fit.sources[key])} is {found} instead of {expected}')
        used = [name for name in fit.used if name in tensors]
        kinds = [f'{name} is {tensors[name].dtype}' for name in used if tensors[name].dtype not in _FLOATS]
        damaged = [name for name in used
                   if tensors[name].dtype in _FLOATS and not torch.isfinite(tensors[name]).all()]
        problems = [f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
                    for what, names in (('missing', fit.missing), ('unexpected', fit.unexpected),
                                        ('of another shape', shapes), ('not of floating point', kinds),
                                        ('not finite', damaged)) if names]
        if problems:
            card = self.card
            raise ValueError(f"{path} does not fit card '{card.name}' ({card.depth} layers of width {card.embed_dims}, "
                             f'patch {card.patch_size}): {"; ".join(problems)}. Nothing was loaded; give the file of '
                             'this card, or the card of this file.')
