"""The student that is exported: its weights, its architecture and where it comes from."""
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.utils import to_2tuple
from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor, nn

from ..compat import config_path
from ..functional import resample_positions
from ..models.students.checkpoint import read_student
from ..models.students.config_text import read_config_text
from ..models.teachers.card import check_normalisation
from ..models.teachers.files import file_digest, read_entries

_TYPES = {'MaskableVisionTransformer', 'VisionTransformer'}
# Of training, or what the features are picked by: features are always all tokens.
_NOT_OF_THE_MODEL = {'type', 'init_cfg', 'init_from', 'frozen_stages', 'drop_rate', 'drop_path_rate', 'out_indices',
                     'out_type', 'final_norm'}


@dataclass
class Student:
    """A ViT and what its manifest says of it.

    Attributes:
        backbone: arguments of ``mmpretrain.VisionTransformer``, with ``type``.
        vit: the model, in eval mode; ``vit(images)[0]`` are the features.
        mean, std: of its images, in 0-255.
        channels: their order, RGB, or what is known of it.
        origin: of the manifest: checkpoint, config, teachers, epochs.
        settings: of the config of its run.
    """

    backbone: dict
    vit: VisionTransformer
    mean: list[float]
    std: list[float]
    channels: str
    origin: dict
    settings: dict

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(self.vit.img_size)

    def at(self, img_size: int) -> 'Student':
        """The same student for square images of ``img_size`` pixels: its positions are resampled, bicubic.

        This is what the student itself does when it is fed images of that size.
        """
        if self.vit.interpolate_mode != 'bicubic':
            raise ValueError(f"the student resamples positions by '{self.vit.interpolate_mode}', and an export for "
                             'another image size by bicubic: leave --img-size out.')
        backbone = {**self.backbone, 'img_size': img_size}
        state, extra, grid = self.vit.state_dict(), self.vit.num_extra_tokens, tuple(self.vit.patch_resolution)
        target = _build(backbone).patch_resolution
        patches = resample_positions(state['pos_embed'][:, extra:], grid, tuple(target), 'bicubic')
        state['pos_embed'] = torch.cat([state['pos_embed'][:, :extra], patches], dim=1)
        return replace(self, backbone=backbone, vit=_fill(_build(backbone), state))


class Features(nn.Module):
    """(B, 3, H, W) normalised images to (B, E + N, C): all tokens after the final norm, the class token first."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)[0]


def load_student(checkpoint: str | Path, config: str | None = None) -> Student:
    """The student of a checkpoint of a distiller, or of what was trained from one.

    Args:
        config: of the run, path or ``mmhdistill::ROOM/NAME.py``; by default the one that a Runner keeps in its
            checkpoints.

    Raises:
        ValueError: no student in the checkpoint, no config, or one that is not of this checkpoint.
    """
    checkpoint = Path(checkpoint).expanduser()
    tensors = read_student(checkpoint)
    beside = read_entries(checkpoint, ('meta', 'teachers'))
    meta = beside.get('meta') or {}
    settings, name, where = _settings(checkpoint, config, meta)
    backbone = _architecture(settings, where)
    vit = _build(backbone)
    _check_fit(checkpoint, tensors, vit, where)
    mean, std, channels = _normalisation(settings, where)
    teachers = beside.get('teachers')
    origin = dict(
        method=name,
        teachers=teachers and {key: {field: receipt.get(field) for field in ('model', 'sha256', 'licence', 'role')}
                               for key, receipt in teachers.items()},
        epochs=meta.get('epoch'), iterations=meta.get('iter'),
        checkpoint=dict(file=checkpoint.name, sha256=file_digest(checkpoint)))
    return Student(backbone, _fill(vit, tensors), mean, std, channels, origin, settings)


def _settings(checkpoint: Path, config: str | None, meta: dict) -> tuple[dict, str, str]:
    """The config, its name, and where it was found."""
    if config is not None:
        return Config.fromfile(config_path(config)).to_dict(), Path(config).stem, config
    if not meta.get('cfg'):
        raise ValueError(f'{checkpoint} keeps no config, as checkpoints of a Runner do, so the architecture of its '
                         'student is unknown: give the config of its run as --config.')
    try:
        settings = read_config_text(meta['cfg'])
    except ValueError as error:
        raise ValueError(f'the config in {checkpoint} {error}: give the config of its run as --config.') from error
    # The Runner appends the time of the start.
    name = re.sub(r'_?\d{8}_\d{6}$', '', meta.get('experiment_name') or '')
    return settings, name or None, f'the config in {checkpoint}'


def _architecture(settings: dict, where: str) -> dict:
    backbone = (settings.get('model') or {}).get('backbone')
    if not isinstance(backbone, dict) or 'type' not in backbone:
        raise ValueError(f'{where} has no model.backbone: give the config of the run as --config.')
    if str(backbone['type']).rpartition('.')[2] not in _TYPES:
        raise ValueError(f"{where} has a backbone of type '{backbone['type']}': expected a student, "
                         'mmhdistill.MaskableVisionTransformer or mmpretrain.VisionTransformer.')
    if not backbone.get('final_norm', True) or backbone.get('out_type') == 'avg_featmap':
        raise ValueError(f'{where} has a backbone without the final norm that features are taken after, as classifiers '
                         "of the mean patch have: give the distiller's checkpoint.")
    return dict(type='mmpretrain.VisionTransformer', out_type='raw',
                **{key: value for key, value in backbone.items() if key not in _NOT_OF_THE_MODEL})


def _build(backbone: dict) -> VisionTransformer:
    """The model, without memory."""
    # mmpretrain's defaults; it would pad the images.
    size, patch = to_2tuple(backbone.get('img_size', 224)), to_2tuple(backbone.get('patch_size', 16))
    if any(side % part or side < part for side, part in zip(size, patch)):
        size, patch = ('x'.join(map(str, sides)) for sides in (size, patch))
        raise ValueError(f'images of {size} pixels cannot be cut into patches of {patch}: choose an image size that is '
                         'a multiple of the patch size.')
    with torch.device('meta'):
        return VisionTransformer(**{key: value for key, value in backbone.items() if key != 'type'})


def _fill(vit: VisionTransformer, tensors: dict[str, Tensor]) -> VisionTransformer:
    vit.load_state_dict({name: x.float() for name, x in tensors.items()}, strict=True, assign=True)
    vit.requires_grad_(False)
    vit.eval()
    return vit


def _check_fit(checkpoint: Path, tensors: dict[str, Tensor], vit: VisionTransformer, where: str) -> None:
    """Before mmpretrain, which resamples positions of another image size while it loads them."""
    own = {name: tuple(x.shape) for name, x in vit.state_dict().items()}
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [f'{name} is {tuple(x.shape)} instead of {own[name]}' for name, x in tensors.items()
              if name in own and tuple(x.shape) != own[name]]
    problems = [f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})' for what, names in (
        ('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if names]
    if problems:
        raise ValueError(f'{checkpoint} does not fit the backbone of {where}: {"; ".join(problems)}. Give the config '
                         'of its run as --config.')


def _normalisation(settings: dict, where: str) -> tuple[list[float], list[float], str]:
    """Mean, std and the order of channels."""
    found = settings['model'].get('data_preprocessor') or settings.get('data_preprocessor') or {}
    mean, std = found.get('mean'), found.get('std')
    if mean is None or std is None:
        raise ValueError(f'{where} does not say how images are normalised: give data_preprocessor a mean and std, RGB '
                         'in 0-255.')
    check_normalisation(mean, std, f'data_preprocessor of {where}')
    channels = 'RGB'
    if not any(found.get(key) for key in ('bgr_to_rgb', 'to_rgb', 'rgb_to_bgr')):
        channels = 'BGR, unless the pipeline loaded RGB'
        MMLogger.get_current_instance().warning(
            'data_preprocessor does not turn BGR into RGB, and images are loaded as BGR by default: unless the '
            'pipeline loaded RGB, the student expects BGR.')
    return [float(x) for x in mean], [float(x) for x in std], channels
