"""Any model of the command line, ready to be looked at: a card, a checkpoint, a config."""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.selfsup import MAEViT, MoCoV3ViT
from torch import Tensor

from ..compat import config_path
from ..export import load_student
from ..models import ViTTeacher
from ..models.students.checkpoint import read_student, stored_config
from ..models.taps import Taps, ViTOutput, ViTSpec
from ..models.teachers.cards import find_card
from ..models.teachers.files import read_entries
from ..models.vit import Reducer, encode, vit_spec
from ..registry import MODELS

# Methods whose encoder is a plain ViT with a class token.
_PRETRAINERS = {scope + encoder.__name__: encoder for scope in ('', 'mmpretrain.') for encoder in (MAEViT, MoCoV3ViT)}


@dataclass
class Model:
    """A ViT that takes RGB images in 0-255, (B, 3, H, W).

    Attributes:
        name: in tables and figures.
        image_size: side of the images that it was made for.
        run: images and taps to its output; a model of a config takes a reducer too (:mod:`mmhdistill.models.vit`).
        settings: ``model`` and ``custom_hooks`` of its config, where there is one.
    """

    name: str
    spec: ViTSpec
    image_size: int
    run: Callable[..., ViTOutput] = field(repr=False)
    settings: dict = field(default_factory=dict, repr=False)


def load_model(text: str) -> Model:
    """What ``text`` names, in eval mode.

    - ``NAME``: a teacher card with its published file; ``NAME=FILE``: with that file; ``NAME=None``: of random weights,
    - ``FILE.pth``: the student of a checkpoint, or the encoder that mmpretrain's MAE or MoCo v3 trained;
      ``CONFIG.py=FILE.pth``: the student of one that keeps no config,
    - ``CONFIG.py`` or ``mmhdistill::ROOM/NAME.py``: the student of a config as it starts from.

    ``LABEL:`` before any of them is its name in figures.

    Raises:
        ValueError, FileNotFoundError: it names none of these, or the file does not fit.
    """
    label, _, rest = text.partition(':')
    if Path(text).exists() or rest.startswith(':') or not rest:
        label, rest = '', text
    if rest.endswith('.py'):
        model = _of_config(rest)
    elif rest.partition('=')[0].endswith('.py'):
        config, _, path = rest.partition('=')
        model = _of_student(path, config)
    elif Path(rest).exists() or '=' not in rest and Path(rest).suffix:
        model = _of_checkpoint(rest)
    else:
        model = _of_card(*rest.partition('=')[::2])
    model.name = label or model.name
    return model


def _of_card(card: str | dict, file: str) -> Model:
    card = find_card(card)
    teacher = ViTTeacher(card, {'': 'auto', 'None': None}.get(file, file), name=card.name, input_mean=[0.0] * 3,
                         input_std=[1.0] * 3)
    if file == 'None':
        teacher.vit.init_weights()
    teacher.load()

    def run(images: Tensor, taps: Taps) -> ViTOutput:
        grid = tuple(side // card.patch_size for side in images.shape[-2:])
        return teacher(images.float(), grid, taps)

    # A patch that does not fit into the image is left out, as its own patch embedding does.
    return Model(card.name, teacher.spec, card.img_size // card.patch_size * card.patch_size, run)


def _of_checkpoint(path: str) -> Model:
    meta = read_entries(path, ('meta',)).get('meta') or {}
    settings = stored_config(meta)
    if ((settings.get('model') or {}).get('backbone') or {}).get('type') in _PRETRAINERS:
        # Configs of mmpretrain have it beside the model.
        preprocessor = settings['model'].get('data_preprocessor') or settings.get('data_preprocessor') or {}
        if preprocessor.get('mean') is None or preprocessor.get('std') is None:
            raise ValueError(f'the config in {path} has no mean and std in data_preprocessor.')
        return _of_card(_card_of_run(_name(path), settings['model']['backbone'], preprocessor), path)
    if not meta.get('cfg'):
        read_student(path)  # Says what else it may be.
        raise ValueError(f'{path} keeps no config, as checkpoints of a Runner do, so the architecture of its student '
                         f'is unknown: give the config of its run with it, CONFIG.py={path}.')
    return _of_student(path)


def _of_student(path: str, config: str | None = None) -> Model:
    student = load_student(path, config)
    return _of_vit(_name(path), student.vit, student.mean, student.std, student.settings)


def _name(path: str) -> str:
    return Path(path).stem if Path(path).parent == Path() else f'{Path(path).parent.name}/{Path(path).stem}'


def _card_of_run(name: str, backbone: dict, data_preprocessor: dict) -> dict:
    """Card of the encoder that a method of mmpretrain trained."""
    encoder = _PRETRAINERS[backbone['type']]
    arch = backbone.get('arch', 'base')
    arch = arch if isinstance(arch, dict) else encoder.arch_zoo[arch]
    return dict(name=name, embed_dims=arch['embed_dims'], depth=arch['num_layers'], num_heads=arch['num_heads'],
                mlp_ratio=arch['feedforward_channels'] / arch['embed_dims'], patch_size=backbone.get('patch_size', 16),
                img_size=backbone.get('img_size', 224), mean=data_preprocessor['mean'], std=data_preprocessor['std'])


def _of_config(path: str) -> Model:
    try:
        cfg = Config.fromfile(config_path(path))
    except SyntaxError as error:
        raise ValueError(f'{path} is no config: {error.msg}, line {error.lineno}.') from error
    backbone = (cfg.get('model') or {}).get('backbone')
    preprocessor = (cfg.get('model') or {}).get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if backbone is None or preprocessor.get('mean') is None:
        raise ValueError(f'{path} has no model.backbone, or no mean and std in data_preprocessor: give the config of a '
                         'distiller or classifier.')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmpretrain')):
        vit = MODELS.build(backbone)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f'the backbone of {path} is a {type(vit).__name__}, and no VisionTransformer of mmpretrain.')
    vit.init_weights()
    vit.eval()
    return _of_vit(Path(path).stem, vit, preprocessor['mean'], preprocessor['std'], cfg.to_dict())


def _of_vit(name: str, vit: VisionTransformer, mean: list[float], std: list[float], settings: dict) -> Model:
    mean, std = (torch.tensor(x, dtype=torch.float).view(-1, 1, 1) for x in (mean, std))

    @torch.no_grad()
    def run(images: Tensor, taps: Taps, reduce: Reducer | None = None) -> ViTOutput:
        return encode(vit, (images - mean) / std, taps, reduce)

    return Model(name, vit_spec(vit), vit.img_size[0], run, settings)
