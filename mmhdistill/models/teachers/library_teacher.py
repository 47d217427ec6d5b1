import torch
from torch import Tensor, nn

from ..flops import encoder_flops
from ..taps import Taps, ViTOutput, ViTSpec
from .attention import BlockReader
from .teacher import Teacher


class LibraryTeacher(Teacher):
    """A teacher that another library builds and runs; the base of :class:`TimmTeacher` and :class:`HuggingFaceTeacher`.

    It is read with hooks: blocks where they return, q, k, v where the attention receives them, after any rotary
    embedding. What cannot be read so is an error. While it is loaded it is in memory twice.

    A subclass has ``_build()`` (the model with random weights), ``_parts(model)`` (patch embedding, blocks, final norm)
    and ``_run(images)``.

    Args:
        model: name in the library.
        library: its name, for messages.
    """

    library = ''

    def __init__(self, model: str, checkpoint: str | None = 'auto', **kwargs):
        super().__init__(**kwargs)
        self.model_name = model
        self.checkpoint = checkpoint
        try:
            with torch.device('meta'):
                self.model = self._build().eval()
        except RuntimeError:
            # A few models look at values while they are built.
            self.model = self._build().eval()
        self._attention_problem = None

    def _probe(self, image_size: tuple[int, int], patch_size: int, num_heads: int, class_token: bool) -> None:
        """Learn the token layout from a forward; on the meta device it takes no memory and no arithmetic."""
        stem, blocks, norm = self._parts(self.model)
        self._reader = BlockReader(blocks, norm)
        images = torch.zeros(1, 3, *image_size, device=next(stem.parameters()).device)
        layers = range(len(blocks))
        try:
            hidden = self._read(images, {layer: frozenset({'hidden'}) for layer in layers})
        except ValueError as error:
            raise self._unreachable(error) from error
        shapes = {tuple(x.shape) for x in hidden.values()}
        self._native_grid = tuple(side // patch_size for side in image_size)
        patches = self._native_grid[0] * self._native_grid[1]
        if len(shapes) != 1 or len(next(iter(shapes))) != 3 or next(iter(shapes))[1] < patches:
            raise self._unreachable(f'its blocks return {sorted(shapes)} for {patches} patches of {patch_size} px, '
                                    'and a plain ViT returns (images, tokens, channels) throughout')
        _, tokens, channels = next(iter(shapes))
        try:
            self._read(images, {layer: frozenset('qkv') for layer in layers})
            num_heads = self._reader.num_heads
        except ValueError as error:
            # Its features can be learned all the same.
            self._attention_problem = error
        self.spec = ViTSpec(embed_dims=channels, depth=len(blocks), num_heads=num_heads, patch_size=patch_size,
                            num_extra_tokens=tokens - patches, class_token=class_token)
        if self.checkpoint is None:
            self._place(self._build())
        self._loaded = self.checkpoint is None

    def _place(self, model: nn.Module) -> None:
        self.model = model.to(self.scale.device, self.scale.dtype).requires_grad_(False).eval()
        stem, blocks, norm = self._parts(self.model)
        self._reader = BlockReader(blocks, norm)

    def _apply(self, fn, recurse: bool = True):
        # Before loading, only the normalisation is there to be moved; the model then follows it.
        return super()._apply(fn, recurse=recurse and self._loaded)

    @torch.no_grad()
    def _read(self, images: Tensor, taps: Taps) -> dict[tuple[int, str], Tensor]:
        return self._reader(lambda: self._run(images), taps)

    def _encode(self, images: Tensor, taps: Taps) -> ViTOutput:
        self.check(taps)
        grid = tuple(side // self.spec.patch_size for side in images.shape[-2:])
        try:
            recorded = self._read(images, taps)
        except ValueError as error:
            raise self._unreachable(error) from error
        tokens = {x.shape[1] for x in recorded.values()}
        if tokens != {self.spec.num_extra_tokens + grid[0] * grid[1]}:
            raise self._unreachable(f'it makes {sorted(tokens)} tokens of {self.spec.num_extra_tokens} extra ones and '
                                    f'{grid[0]}x{grid[1]} patches')
        return ViTOutput(recorded, self.spec.num_extra_tokens, grid)

    def check(self, taps: Taps) -> None:
        """Raise ValueError where ``taps`` ask for what cannot be read."""
        if self._attention_problem and any(kinds & {'q', 'k', 'v'} for kinds in taps.values()):
            raise self._unreachable(self._attention_problem)

    def describe_run(self, student_grid: tuple[int, int], taps: Taps, kept: int | None = None) -> dict:
        self.check(taps)
        return super().describe_run(student_grid, taps, kept)

    def _unreachable(self, reason: Exception | str) -> ValueError:
        return ValueError(f"teacher '{self.name}', {self.model_name} of {self.library}, cannot be read as asked: "
                          f'{reason}.')

    def _extra_tokens(self) -> str:
        return str(self.spec.num_extra_tokens)

    def _positions_note(self, grid: tuple[int, int]) -> str:
        if tuple(grid) == self._native_grid:
            return 'as trained'
        return f'from {"x".join(map(str, self._native_grid))} to {"x".join(map(str, grid))} by {self.library}'

    def _flops(self, patches: int, tokens: int, taps: Taps) -> int:
        stem, blocks, _ = self._parts(self.model)
        # The deepest block runs to its end.
        whole = {max(taps): frozenset({'hidden'})}
        return encoder_flops(stem, blocks, self.spec.embed_dims, patches, [tokens] * self.spec.depth, whole)
