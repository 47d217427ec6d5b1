import contextlib
from pathlib import Path

from torch import Tensor, nn

from ...registry import MODELS
from .fetch import verify
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
        mean, std: of the images that it was trained on, RGB in 0-255; by default those of timm's name and tag.
        model_args: further arguments of ``timm.create_model`` that shape the model.
        name, input_mean, input_std, image_size: see :class:`Teacher`.
    """

    library = 'timm'

    def __init__(self, model: str, checkpoint: str | None = 'auto', sha256: str | None = None,
                 mean: list[float] | None = None, std: list[float] | None = None, model_args: dict | None = None,
                 name: str = 'teacher', **kwargs):
        self._timm = require('timm', 'TimmTeacher')
        self._sha256 = sha256
        self._model_args = model_args or {}
        if taken := {'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir',
                     'num_classes'} & set(self._model_args):
            raise ValueError(f"teacher '{name}' gives timm {sorted(taken)} in model_args, which decide what is loaded: "
                             'leave them out; weights are named by model or checkpoint.')
        self.name = name
        super().__init__(model, checkpoint, name=name, **kwargs)
        cfg = self._cfg = self.model.pretrained_cfg
        self._own = set(self.model.state_dict())
        self._set_normalisation(mean or [255 * x for x in cfg['mean']], std or [255 * x for x in cfg['std']])
        stem, blocks, _ = self._parts(self.model)
        patch = stem.patch_size if isinstance(stem.patch_size, tuple) else (stem.patch_size, )
        if len(set(patch)) != 1:
            raise self._unreachable(f'its patches are {patch}, and square ones are expected')
        self._probe(cfg['input_size'][1:], patch[0], getattr(getattr(blocks[0], 'attn', None), 'num_heads', 0),
                    class_token=getattr(self.model, 'cls_token', None) is not None)

    def _build(self, **kwargs) -> nn.Module:
        args = dict(num_classes=0, **self._model_args)
        try:
            try:
                return self._timm.create_model(self.model_name, dynamic_img_size=True, **args, **kwargs)
            except TypeError as error:
                if 'dynamic_img_size' not in str(error):
                    raise
                return self._timm.create_model(self.model_name, **args, **kwargs)
        except RuntimeError as error:
            if not any(words in str(error) for words in ('Unknown model', 'Invalid pretrained tag')):
                raise
            raise ValueError(f"teacher '{self.name}': timm {self._timm.__version__} does not know '{self.model_name}' "
                             f'({error}). See timm.list_models(pretrained=True); newer models need a newer timm.'
                             ) from error

    def _parts(self, model: nn.Module) -> tuple[nn.Module, nn.ModuleList, nn.Module | None]:
        stem = getattr(model, 'patch_embed', None)
        if not hasattr(stem, 'patch_size') or not getattr(model, 'blocks', None):
            raise self._unreachable('it is no plain ViT, with patch_embed of one patch size and blocks')
        return stem, model.blocks, getattr(model, 'norm', None)

    def _misfit(self, path: Path, reason: str) -> ValueError:
        reason = reason if len(reason) < 400 else f'{reason[:400]} ...'
        return ValueError(f"{path} does not fit '{self.model_name}' of timm ({reason}). Nothing was loaded; give the "
                          'file of this model, or the model of this file.')

    def _of_another_shape(self, tensors: dict[str, Tensor]) -> list[str]:
        own = self.model.state_dict()
        if self._own <= set(tensors):
            return [f'{name} is {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}'
                    for name in own if tensors[name].shape != own[name].shape]
        # In other names: what can only be a patch embedding, or positions of this width up to extra tokens.
        wrong, width = [], self.spec.embed_dims
        for key, like in (('patch_embed.proj.weight', lambda name, x: x.ndim == 4 and x.shape[:2] == (width, 3)),
                          ('pos_embed', lambda name, x: 'pos' in name and x.ndim in (2, 3) and x.shape[-1] == width)):
            found = {name: x for name, x in tensors.items() if key in own and like(name, x)}
            slack = self.spec.num_extra_tokens * width if key == 'pos_embed' else 0
            if found and not any(abs(x.numel() - own[key].numel()) <= slack for x in found.values()):
                wrong += [f'{name} is {tuple(x.shape)} for a {key} of {tuple(own[key].shape)}'
                          for name, x in found.items()]
        return wrong

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
        digest = verify(path, self.checkpoint == 'auto', self._sha256)
        weights = read_tensors(path)
        names = set(weights.tensors)
        classifier = self._cfg.get('classifier') or 'head'
        heads = tuple(f'{head}.' for head in ([classifier] if isinstance(classifier, str) else classifier))
        tensors = weights.tensors
        if self._own <= names:
            tensors = {name: x for name, x in tensors.items() if not name.startswith(heads)}
        # timm's converters resample other patches and positions, and say nothing.
        if wrong := self._of_another_shape(tensors):
            raise self._misfit(path, f'{len(wrong)} of another shape ({"; ".join(wrong[:3])})')
        try:
            with _results_of_loading() as results:
                model = self._build(pretrained=True, pretrained_cfg_overlay=dict(state_dict=tensors))
        except (RuntimeError, KeyError) as error:
            raise self._misfit(path, ' '.join(str(error).split())) from error
        # timm is strict only where the model has the classes of its published file, and not even then always.
        missing = [key for result in results for key in result.missing_keys]
        unexpected = [key for result in results for key in result.unexpected_keys
                      if not key.startswith((*heads, 'attn_pool.', 'fc_norm.'))]
        if missing or unexpected or not results:
            raise self._misfit(path, f'{len(missing)} missing ({", ".join(missing[:3])}), {len(unexpected)} unexpected '
                               f'({", ".join(unexpected[:3])})')
        model.pretrained_cfg = self._cfg  # timm would keep the file's tensors there
        self._place(model)
        own = self._own
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
