"""Tiny models, images, a listener to the log and two-process runs, shared by the tests."""
import contextlib
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger
from PIL import Image
from torch import Tensor, nn

from mmhdistill.engine.launch import leave

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
OTHER = dict(mean=[100.0, 110.0, 120.0], std=[60.0, 70.0, 80.0])
_LOGGERS = itertools.count()

# At these sizes a second thread costs far more than it computes.
torch.set_num_threads(1)


def tiny_card(**kwargs) -> dict:
    """A teacher of 3 layers for 4x4 patches of 8 px."""
    return {**dict(name='tiny', embed_dims=32, depth=3, num_heads=4, patch_size=8, img_size=32, **IMAGENET), **kwargs}


def tiny_student(**kwargs) -> dict:
    arch = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
    return {**dict(type='mmhdistill.MaskableVisionTransformer', arch=arch, img_size=32, patch_size=8), **kwargs}


def tiny_teacher(**kwargs) -> dict:
    """A frozen teacher of random weights."""
    return dict(type='mmhdistill.ViTTeacher', card=tiny_card(**kwargs), checkpoint=None)


def tiny_distiller(**kwargs) -> dict:
    """Features of one teacher, relations of the other, input masking with the latter."""
    return {
        **dict(
            type='mmhdistill.HybridDistiller',
            data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **IMAGENET),
            backbone=tiny_student(),
            teachers=dict(clip=tiny_teacher(name='clip-like', embed_dims=48, num_heads=4, pre_norm=True, **OTHER),
                          mae=tiny_teacher(name='mae-like')),
            masker=dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.8, teacher='mae'),
            losses=dict(feature=dict(type='mmhdistill.FeatureLoss', teacher='clip'),
                        relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae'))),
        **kwargs
    }


def narrow(model: dict) -> dict:
    """Arguments for :func:`build_distiller`: the losses and masker of a config, for models of 12 layers and 16 patches
    that are half as wide in the student as in the teachers, all of random weights."""
    arch = dict(embed_dims=24, num_layers=12, num_heads=4, feedforward_channels=48)
    clip = dict(pre_norm=True, **OTHER)
    return dict(
        backbone={**model['backbone'], 'arch': arch, 'img_size': 32, 'patch_size': 8, 'init_from': None},
        teachers={name: tiny_teacher(name=name, embed_dims=48, depth=12, **(clip if name == 'clip' else {}))
                  for name in model['teachers']},
        masker=model.get('masker'), losses=model['losses'])


def build_distiller(seed: int = 0, **kwargs) -> nn.Module:
    """:func:`tiny_distiller` with initialised weights, of which none is left at zero."""
    from mmhdistill.registry import MODELS
    torch.manual_seed(seed)
    model = MODELS.build(tiny_distiller(**kwargs))
    model.init_weights()
    for module in (model, *model.teachers.values()):
        randomise(module, seed)
    return model


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Add small noise to every parameter, so that no bias or norm is the identity and no two keys are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def random_images(batch: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def write_images(folder: Path, names: list[str], size: int = 32, seed: int = 0) -> list[Path]:
    """Random JPEG or PNG images at ``names`` inside ``folder``."""
    rng = np.random.default_rng(seed)
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return paths


def write_camvid(folder: Path, number: int = 2) -> None:
    """Random images of CamVid's layout and size, labelled 0, 10 and 255 in stripes narrower than a crop."""
    label = np.tile(np.repeat(np.array([0, 10, 255], np.uint8), 20), (360, 8))
    for split in ('train', 'val', 'test'):
        write_images(folder / 'img_dir' / split, [f'{i}.jpg' for i in range(number)], size=480)
        (folder / 'ann_dir' / split).mkdir(parents=True)
        for i in range(number):
            path = folder / 'img_dir' / split / f'{i}.jpg'
            Image.open(path).crop((0, 0, 480, 360)).save(path)
            Image.fromarray(label).save(folder / 'ann_dir' / split / f'{i}.png')


class Payload:
    """Makes the folder ``path`` when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Clones of all parameters and buffers, those outside ``state_dict`` too."""
    return {name: x.detach().clone() for name, x in itertools.chain(module.named_parameters(), module.named_buffers())}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = snapshot(module)
    assert list(after) == list(before)
    assert [name for name, x in after.items() if not torch.equal(x, before[name])] == []


def without_gradient(module: nn.Module) -> list[str]:
    """Trainable parameters that the last backward did not reach: what DDP would wait for."""
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@contextlib.contextmanager
def log_messages():
    """What is logged through mmengine inside the block, from level INFO."""
    messages: list[str] = []

    class Listener(logging.Handler):

        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    # A logger of its own: mmengine drops a warning that a logger has given before.
    logger = MMLogger.get_instance(f'test-{next(_LOGGERS)}')
    logger.handlers.append(Listener(logging.INFO))
    yield messages


def spawn(work: Callable, folder: Path, *args, world_size: int = 2) -> None:
    """Run ``work(rank, *args)`` in ``world_size`` processes that talk over gloo; a failure is raised here."""
    torch.multiprocessing.spawn(_join, (work, world_size, str(folder / 'rendezvous'), args), nprocs=world_size)


def _join(rank: int, work: Callable, world_size: int, rendezvous: str, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=world_size)
    work(rank, *args)
    leave()
