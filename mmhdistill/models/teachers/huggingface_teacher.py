import inspect
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...registry import MODELS
from .fetch import verify
from .files import existing_file
from .library_teacher import LibraryTeacher
from .optional import from_hub, require
from .receipt import Receipt, dtype_note

# Of the embeddings, in files of other versions or of a masked model, and not used.
_NO_WEIGHTS = ('position_ids', 'mask_token')


@MODELS.register_module()
class HuggingFaceTeacher(LibraryTeacher):
    """A frozen plain ViT of transformers, by name: ``HuggingFaceTeacher('facebook/dinov2-base')``.

    Needs ``pip install 'transformers<=4.48.3'``. Of a model of images and text, the image tower is taken. Only
    ``model.safetensors`` is read.

    Args:
        model: name on the hub, ``NAME@REVISION``, or a folder with ``config.json`` and ``model.safetensors``.
        checkpoint: ``'auto'`` loads what ``model`` stands for; None keeps random weights, for tests.
        sha256: published hash of the file, or its beginning.
        mean, std: of the images that it was trained on, RGB in 0-255; by default from ``preprocessor_config.json``.
        name, input_mean, input_std, image_size: see :class:`Teacher`.
    """

    library = 'transformers'

    def __init__(self, model: str, checkpoint: str | None = 'auto', sha256: str | None = None,
                 mean: list[float] | None = None, std: list[float] | None = None, name: str = 'teacher', **kwargs):
        self._transformers = require('transformers', 'HuggingFaceTeacher')
        if checkpoint not in ('auto', None):
            raise ValueError(f"HuggingFaceTeacher loads what its model stands for, got checkpoint='{checkpoint}': set "
                             'model to the folder with the weights, or checkpoint to None for random weights.')
        self.name, self._repository, self._sha256 = name, model, sha256
        config_file = self._file('config.json')
        config = self._transformers.AutoConfig.from_pretrained(config_file.parent)
        self._config = getattr(config, 'vision_config', config)
        if hasattr(self._config, 'mask_ratio'):
            raise ValueError(f"teacher '{name}', {model} of transformers, masks its own input at random: use "
                             'ViTTeacher with a card (mae-vit-b-p16, ...) and checkpoint=FILE, which reads its file.')
        super().__init__(model, checkpoint, name=name, **kwargs)
        if mean is None or std is None:
            mean, std = self._normalisation()
        self._set_normalisation(mean, std)
        size, patch = (getattr(self._config, key, None) for key in ('image_size', 'patch_size'))
        if not isinstance(patch, int) or not isinstance(size, int):
            raise self._unreachable(f'its patches are {patch} and its images {size}, and square ones are expected')
        stem, _, _ = self._parts(self.model)
        self._probe((size, size), patch, self._config.num_attention_heads,
                    class_token=hasattr(stem, 'cls_token') or hasattr(stem, 'class_embedding'))

    def _file(self, file: str) -> Path:
        if Path(self._repository).expanduser().is_dir():
            return existing_file(Path(self._repository).expanduser() / file)
        return from_hub(self._repository, file, self.name,
                        f'give the folder that holds it: model.teachers.{self.name}.model=FOLDER')

    def _normalisation(self) -> tuple[list[float], list[float]]:
        """Of images in 0-255, from what the preprocessor does to them."""
        try:
            found = json.loads(self._file('preprocessor_config.json').read_text())
            if found.get('do_flip_channel_order'):
                raise ValueError('its images are BGR')
            scale = found.get('rescale_factor', 1 / 255) if found.get('do_rescale', True) else 1
            if not found.get('do_normalize', True):
                return [0.0] * 3, [1 / scale] * 3
            return [x / scale for x in found['image_mean']], [x / scale for x in found['image_std']]
        except (FileNotFoundError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = 'it has no preprocessor_config.json' if isinstance(error, FileNotFoundError) else error
            raise ValueError(f"teacher '{self.name}', {self.model_name} of transformers, does not say how its images "
                             f'are normalised ({reason}): give mean and std, RGB in 0-255.') from error

    def _build(self) -> nn.Module:
        return self._transformers.AutoModel.from_config(self._config, attn_implementation=self._attention())

    def _attention(self) -> str:
        """Attention that can be read, where the library has it for this model."""
        model_class = self._transformers.AutoModel._model_mapping.get(type(self._config), None)
        if model_class is None:
            raise self._unreachable(f'AutoModel has no model for {type(self._config).__name__}')
        return 'sdpa' if getattr(model_class, '_supports_sdpa', False) else 'eager'

    def _parts(self, model: nn.Module) -> tuple[nn.Module, nn.ModuleList, nn.Module | None]:
        tower = getattr(model, 'vision_model', model)
        encoder = getattr(tower, 'encoder', None)
        blocks = getattr(encoder, 'layer', getattr(encoder, 'layers', None))
        embeddings = getattr(tower, 'embeddings', None)
        if not isinstance(blocks, nn.ModuleList) or embeddings is None:
            raise self._unreachable('a plain ViT of transformers has embeddings, and encoder.layer or encoder.layers')
        return embeddings, blocks, getattr(tower, 'layernorm', getattr(tower, 'post_layernorm', None))

    def _run(self, images: Tensor) -> None:
        options = {}
        if 'interpolate_pos_encoding' in inspect.signature(self.model.forward).parameters:
            options['interpolate_pos_encoding'] = True
        self.model(pixel_values=images, **options)

    def _load(self) -> Receipt:
        path = self._file('model.safetensors')
        digest = verify(path, not Path(self._repository).expanduser().is_dir(), self._sha256)
        try:
            model, info = self._transformers.AutoModel.from_pretrained(
                path.parent, config=self._config, attn_implementation=self._attention(), use_safetensors=True,
                output_loading_info=True, ignore_mismatched_sizes=True)  # they are refused below, with the rest
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            raise ValueError(f'{path} cannot be loaded as {self.model_name} of transformers: {error}') from error
        # Only what runs must be there: a pooler behind the last block may be missing.
        stem, blocks, norm = self._parts(model)
        needed = {id(p) for module in (stem, *blocks, *filter(None, [norm])) for p in module.parameters()}
        names = {name for name, p in model.named_parameters() if id(p) in needed}
        prefix = f'{model.base_model_prefix}.'  # in files of a model with a head
        found = {kind: {name.removeprefix(prefix): name for name in info[f'{kind}_keys']}
                 for kind in ('missing', 'unexpected')}
        missing = sorted(found['missing'][name] for name in names & set(found['missing']))
        inside = tuple(f'{name}.' for name, module in model.named_modules() if module in (stem, blocks))
        unexpected = [name for own, name in found['unexpected'].items()
                      if own.startswith(inside) and not own.endswith(_NO_WEIGHTS)]
        shapes = [f'{name} is {tuple(theirs)} instead of {tuple(own)}' for name, theirs, own in info['mismatched_keys']]
        problems = [f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})' for what, keys
                    in (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if keys]
        if problems:
            raise ValueError(f"{path} does not fit '{self.model_name}' of transformers: {'; '.join(problems)}. Nothing "
                             'was loaded; give the weights of this config.json.')
        with safe_open(path, 'pt') as file:
            dtypes = {file.get_tensor(name).dtype for name in file.keys() if name.removeprefix(prefix) in names}  # noqa: SIM118
        self._place(model)
        return Receipt(
            name=self.name, model=f'{self.model_name} of transformers {self._transformers.__version__}',
            source=str(path), matched=len(names), total=len(names), mean=self.mean, std=self.std, format='transformers',
            unused=sorted(info['unexpected_keys']), sha256=digest, published=bool(self._sha256) or None,
            dtype=dtype_note(dtypes, self.scale.dtype))
