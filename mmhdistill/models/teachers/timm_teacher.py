import contextlib
from pathlib import Path

from torch import Tensor, nn

from ...registry import MODELS
from .fetch import Mismatch, check_digest
from .files import existing_file, read_tensors
from .library_teacher import LibraryTeacher
from .optional import from_hub, require
from .receipt import Receipt, dtype_note


@MODELS.register_module()
class TimmTeacher(LibraryTeacher):
    """A frozen plain ViT of timm, by name: ``TimmTeacher('vit_small_patch16_dinov3.lvd1689m')``.

    Needs ``pip install timm``. timm builds the model, converts the file and resamples positions; the file is fetched
    through the Hugging Face hub and read as data. Mean, std and licence are those of timm's ``pretrained_cfg``.

    Args:
        model: name for ``timm.create_model``, with its tag.
        checkpoint: ``'auto'`` fetches what the name stands for; else the path of a file that timm can convert; None
            keeps random weights, for tests.
        sha256: published hash of the file, or its beginning.
        model_args: further arguments of ``timm.create_model``.
        name, input_mean, input_std, image_size: see :class:`Teacher`.
    """

    library = 'timm'

    def __init__(self, model: str, checkpoint: str | None = 'auto', sha256: str | None = None,
                 model_args: dict | None = None, **kwargs):
        self._timm = require('timm', 'TimmTeacher')
        self._sha256 = sha256
        self._model_args = model_args or {}
        self._model_name = model
        super().__init__(model, checkpoint, **kwargs)
        cfg = self._cfg = self.model.pretrained_cfg
        self._set_normalisation(*([255 * x for x in cfg[key]] for key in ('mean', 'std')))
        patch = getattr(getattr(self.model, 'patch_embed', None), 'patch_size', None)
        if patch is None or len(set(patch)) != 1:
            raise self._unreachable(f'its patches are {patch}, and square ones are expected')
        self._probe(cfg['input_size'][1:], patch[0], getattr(getattr(self._parts(self.model)[1][0], 'attn', None),
                                                             'num_heads', 0))

    def _build(self, **kwargs) -> nn.Module:
        args = dict(num_classes=0, **self._model_args)
        try:
            return self._timm.create_model(self._model_name, dynamic_img_size=True, **args, **kwargs)
        except TypeError as error:
            if 'dynamic_img_size' not in str(error):
                raise
            return self._timm.create_model(self._model_name, **args, **kwargs)

    def _parts(self, model: nn.Module) -> tuple[nn.Module, nn.ModuleList, nn.Module | None]:
        missing = [name for name in ('patch_embed', 'blocks', 'forward_features') if not hasattr(model, name)]
        if missing or not len(model.blocks):
            raise self._unreachable(f'a plain ViT of timm has {", ".join(missing) or "blocks"}')
        return model.patch_embed, model.blocks, getattr(model, 'norm', None)

    def _run(self, images: Tensor) -> None:
        self.model.forward_features(images)

    def _load(self) -> Receipt:
        if self.checkpoint == 'auto':
            if not self._cfg.get('hf_hub_id'):
                raise ValueError(f"timm names no weights for '{self.model_name}': give its tag, for example "
                                 "'vit_base_patch16_224.dino', or set checkpoint to the path of a file.")
            path = from_hub(self._cfg['hf_hub_id'], self._cfg.get('hf_hub_filename') or 'model.safetensors', self.name,
                            f'give its path: model.teachers.{self.name}.checkpoint=FILE')
        else:
            path = existing_file(Path(self.checkpoint).expanduser())
        try:
            digest = check_digest(path, self._sha256)
        except Mismatch as error:
            raise ValueError(f'{path} {error}. Delete it to fetch it again, or give the right one.') from error
        weights = read_tensors(path)
        names = set(weights.tensors)
        classifier = self._cfg.get('classifier') or 'head'
        heads = tuple(f'{head}.' for head in ([classifier] if isinstance(classifier, str) else classifier))
        tensors = {name: x for name, x in weights.tensors.items() if not name.startswith(heads)}
        try:
            # timm loads strictly only where the model has the classes of its published file, and not even then always.
            with _results_of_loading() as results:
                model = self._build(pretrained=True, pretrained_cfg_overlay=dict(
                    state_dict=tensors, num_classes=0, label_offset=0))
            if missing := [key for result in results for key in result.missing_keys]:
                raise RuntimeError(f'Missing key(s) in state_dict: {", ".join(missing)}')
        except (RuntimeError, KeyError) as error:
            reason = ' '.join(str(error).split())
            raise ValueError(f"{path} does not fit '{self.model_name}' of timm ({reason}). Nothing was loaded; give "
                             'the file of this model, or the model of this file.') from error
        model.pretrained_cfg = self._cfg  # timm would keep the file's tensors there
        self._place(model)
        own = set(model.state_dict())
        return Receipt(
            name=self.name, model=f'{self.model_name} of timm {self._timm.__version__}', source=str(path),
            matched=len(own), total=len(own), mean=self.mean, std=self.std,
            format='timm' if own <= names else "timm's conversion of another", entry=weights.entry,
            unused=(sorted(names - own) if own <= names else []) + weights.beside, sha256=digest,
            published=bool(self._sha256) or None, licence=self._cfg.get('license') or '',
            dtype=dtype_note({x.dtype for x in tensors.values()}, self.scale.dtype))


@contextlib.contextmanager
def _results_of_loading():
    """What ``load_state_dict`` returns, wherever it is called inside: timm drops it."""
    results, load = [], nn.Module.load_state_dict

    def recorded(module, *args, **kwargs):
        results.append(load(module, *args, **kwargs))
        return results[-1]

    nn.Module.load_state_dict = recorded
    try:
        yield results
    finally:
        nn.Module.load_state_dict = load
