"""The student out of a checkpoint, for whatever model it goes on in."""
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import load_state_dict
from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor, nn

from ..teachers.files import read_entries, read_tensors
from ..teachers.formats import recognise
from .config_text import read_config_text

_DETECTORS = {'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'panoptic_head', 'decode_head', 'auxiliary_head'}
_NEW, _DROPPED = re.compile(r'\.rel_pos_[hw]$|^ln2\.'), re.compile(r'(cls_token|mask_token)$|ln[12]\.')
_KINDS = {'losses': 'a distiller', 'head': 'a classifier', '': 'a bare ViT'}


def read_student(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the student by the names of ``mmpretrain.VisionTransformer``, from a checkpoint of a distiller, of a
    classifier that was trained from it, or of the student alone; its kind is logged.

    Raises:
        ValueError: a file of another kind: a teacher's, a detector's, a segmentor's, one without a ViT.
    """
    weights = read_tensors(path)
    if all(name.startswith('module.') for name in weights.tensors):  # saved in a DDP wrapper
        weights.tensors = {name.removeprefix('module.'): x for name, x in weights.tensors.items()}
    try:
        fmt, prefix = recognise(weights.tensors)
    except ValueError as error:
        raise ValueError(f'{path} {error} A checkpoint of a distiller, or of its student, is expected.') from error
    outside = {name.split('.')[0] for name in weights.tensors if not name.startswith(prefix)}
    if fmt.name != 'mmpretrain':
        raise ValueError(f'{path} holds a ViT in {fmt.name} format, as teachers do, and not a student: give the '
                         'checkpoint of a distiller, or its export --to mmpretrain. To start from a teacher, give a '
                         'MaskableVisionTransformer init_from=dict(card=..., checkpoint=...).')
    if found := sorted(outside & _DETECTORS):
        raise ValueError(f'{path} is the checkpoint of a detector or segmentor (it has {", ".join(found)}), and not of '
                         "a student: give the distiller's checkpoint that it started from.")
    # A classifier may have a neck with weights (a linear probe's BatchNorm has), and has a head too.
    pretraining = outside - {'losses', 'head', 'neck'} or 'neck' in outside and 'head' not in outside
    if prefix not in ('', 'backbone.') or pretraining:
        raise ValueError(f'{path} is the checkpoint of another pre-training method (it has '
                         f'{", ".join(sorted(outside))}), and not of a student: give the checkpoint of a distiller.')
    kind = next(kind for group, kind in _KINDS.items() if group in outside or not group)
    student = {name.removeprefix(prefix): x for name, x in weights.tensors.items() if name.startswith(prefix)}
    if damaged := [name for name, x in student.items() if not torch.isfinite(x).all()]:
        raise ValueError(f'{path} holds a student that is not finite ({", ".join(damaged[:3])}): its run diverged. '
                         'Give an earlier checkpoint.')
    MMLogger.get_current_instance().info(
        f'{path} is the checkpoint of {kind}: {len(student)} tensors of the ViT are taken'
        + (f', {", ".join(sorted(outside))} left aside' if outside else ''))
    return student


def start_from_student(model: nn.Module, path: str | Path) -> None:
    """Load the student of ``path`` into ``model``, a ViT of mmpretrain or mmhdistill, strictly.

    ``model.started_from`` keeps what the file tells of it: ``file``, ``teachers`` (their receipts) and
    ``data_preprocessor`` (its settings), for the record of the run and for checks.

    Raises:
        ValueError: no student, or one of another architecture; see :func:`read_student` and :func:`check_fit`.
    """
    weights = read_student(path)
    _, dropped = check_fit(model, weights)
    beside = read_entries(path, ('meta', 'teachers'))
    settings = stored_config(beside.get('meta') or {})
    _check_heads(model, path, settings)
    if 'cls_token' in dropped:  # and its position; mmpretrain does so for the same grid alone
        weights['pos_embed'] = weights['pos_embed'][:, 1:]
    for name in dropped:
        del weights[name]
    if dropped:
        MMLogger.get_current_instance().info(f'{type(model).__name__} goes without {", ".join(dropped)}')
    load_state_dict(model, weights, logger='current')
    preprocessor = (settings.get('model') or {}).get('data_preprocessor') or settings.get('data_preprocessor') or {}
    model.started_from = dict(file=str(path), teachers=beside.get('teachers') or {}, data_preprocessor=preprocessor)


def stored_config(meta: dict) -> dict:
    """Settings of the config that a Runner keeps in the ``meta`` of its checkpoints; empty where there are none."""
    try:
        return read_config_text(meta['cfg'])
    except (KeyError, TypeError, ValueError):
        return {}


def _check_heads(model: nn.Module, path: str | Path, settings: dict) -> None:
    """The number of heads shows in no tensor."""
    arch = ((settings.get('model') or {}).get('backbone') or {}).get('arch')
    arch = VisionTransformer.arch_zoo.get(arch) if isinstance(arch, str) else arch
    theirs = arch.get('num_heads') if isinstance(arch, dict) else None
    ours = getattr(model, 'arch_settings', {}).get('num_heads')
    if None not in (theirs, ours) and theirs != ours:
        raise ValueError(f'the student of {path} has {theirs} heads, and this {type(model).__name__} {ours}: give arch '
                         'as the student has it.')


def check_fit(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names that ``model`` has beyond a student's, and names of ``weights`` that it goes without.

    A ViT in a detector has relative positions, and may lack class token and final norm; the grid of positions may be
    another.

    Raises:
        ValueError: other tensors are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    new = sorted(name for name in own.keys() - weights.keys() if _NEW.search(name))
    dropped = sorted(name for name in weights.keys() - own.keys() if _DROPPED.match(name))
    shapes = {name: (tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights}
    wrong = {
        'missing': sorted(own.keys() - weights.keys() - set(new)),
        'unexpected': sorted(weights.keys() - own.keys() - set(dropped)),
        'of another shape': [
            f'{name}: {theirs} there, {ours} here' for name, (theirs, ours) in shapes.items()
            if theirs != ours and (name != 'pos_embed' or theirs[-1] != ours[-1])],
    }
    if any(wrong.values()):
        found = '; '.join(f'{len(names)} tensors are {what} ({", ".join(names[:3])})'
                          for what, names in wrong.items() if names)
        raise ValueError(f'these weights are not of this {type(model).__name__}: {found}. Give arch and patch_size as '
                         'the student has them, or the checkpoint of a student of this arch.')
    return new, dropped
