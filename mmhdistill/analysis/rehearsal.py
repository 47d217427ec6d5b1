"""A training step of a distiller by its shapes alone: without weights, memory, arithmetic or data."""
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..models import HybridDistiller
from ..models.taps import ViTOutput
from ..registry import MODELS


@dataclass(frozen=True)
class Step:
    """Bytes and arithmetic of a training step.

    Attributes:
        student, losses: bytes per image that autograd keeps of each for the backward pass, parameters left out.
        teachers: bytes per image of what is read of the teachers.
        fixed: bytes that autograd keeps however many images there are: under autocast, weights in 16 bits.
        loss_flops: loss -> FLOPs per image of its forward and backward, projectors and decoders with it.
    """

    student: int
    losses: int
    teachers: int
    fixed: int
    loss_flops: dict[str, int]


def build_on_meta(cfg: Config) -> HybridDistiller:
    """The distiller of ``cfg``, whose student and teachers are on the meta device; nothing is read or fetched.

    Raises:
        ValueError: ``cfg`` is of another model.
    """
    model = cfg.get('model') or {}
    kind = model.get('type')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        found = MODELS.get(kind) if isinstance(kind, str) else kind
        if not (isinstance(found, type) and issubclass(found, HybridDistiller)):
            raise ValueError(f'{cfg.filename} {f"trains {kind}" if kind else "has no model"}, and only a distiller '
                             '(mmhdistill.HybridDistiller) has teachers and losses to plan: give a config of '
                             'configs/hdistill, configs/moma or configs/baselines, or one like them.')
        if missing := sorted({'train_dataloader', 'train_cfg', 'optim_wrapper'} - set(cfg)):
            raise ValueError(f'{cfg.filename} lacks {", ".join(missing)}: a plan is made for a config that can be '
                             'trained.')
        model = model.to_dict()
        model['backbone'] = dict(type=_on_meta, cfg=model.get('backbone'))
        for teacher in (model.get('teachers') or {}).values():
            if teacher and 'checkpoint' in teacher:
                # Random weights would take memory; weights that are to be read do so when they are read.
                teacher['checkpoint'] = teacher['checkpoint'] or 'auto'
        return MODELS.build(model)


def _on_meta(cfg: dict) -> nn.Module:
    with torch.device('meta'):
        return MODELS.build(cfg)


class Rehearsal:
    """Runs steps of a distiller on fake tensors: they have shapes, types and graphs, and no values.

    What a step refuses (sizes, grids, tokens), it refuses here with the same words.

    Args:
        distiller: of :func:`build_on_meta`; it is turned into one of fake tensors.
        image_size: (height, width).
        half: under autocast to 16 bits.
    """

    def __init__(self, distiller: HybridDistiller, image_size: tuple[int, int], half: bool):
        self._distiller, self._size, self._half = distiller, image_size, half
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        for teacher in distiller.teachers.values():
            # Shapes are all that is asked of it.
            teacher._loaded = True
        with self._mode:
            distiller._apply(lambda x: torch.empty_like(x, device='cpu'))
        distiller.train()

    def step(self) -> Step:
        """Of the config's own way, at the masker's present keep rate."""
        # Of one image, some copies are views.
        two, outputs = self._saved(2)
        three, _ = self._saved(3)
        each = {part: three[part] - two[part] for part in two}
        flops = {name: self._flops(name, *outputs) // 2 for name in self._distiller.losses}
        return Step(fixed=sum(two.values()) - 2 * sum(each.values()), loss_flops=flops, **each)

    def unmasked_loss_flops(self) -> dict[str, int]:
        """FLOPs per image of the losses that can be computed when the student sees every token."""
        masker, self._distiller.masker = self._distiller.masker, None
        found = {}
        with self._mode, self._autocast():
            outputs = self._distiller.encode(torch.zeros(1, 3, *self._size))
        self._distiller.masker = masker
        for name in self._distiller.losses:
            # MaskedFeatureLoss predicts what is not seen, and all is.
            with contextlib.suppress(ValueError):
                found[name] = self._flops(name, *outputs)
        return found

    def _autocast(self):
        # Of the CPU, since fake CUDA tensors need a GPU; it casts the operations of a ViT as that of CUDA does.
        return torch.autocast('cpu', dtype=torch.bfloat16, enabled=self._half)

    def _saved(self, batch: int) -> tuple[dict[str, int], tuple[ViTOutput, dict[str, ViTOutput]]]:
        """Bytes of the storages that autograd keeps, each counted once, and of what is read of the teachers; and what
        the losses read."""
        kept, part = {}, 'student'
        with self._mode:
            images = torch.zeros(batch, 3, *self._size)
            known = set(_storages([images, *self._distiller.parameters()]))

            def keep(x: Tensor) -> Tensor:
                for key, storage in _storages([x]).items():
                    if key not in known:
                        kept.setdefault(key, (part, storage))
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), self._autocast():
                student, teachers = self._distiller.encode(images)
                part = 'losses'
                for name, loss in self._distiller.losses.items():
                    loss(student, teachers[name])
        read = _storages(x for output in teachers.values() for x in output.taps.values())
        saved = {part: sum(x.nbytes() for owner, x in kept.values() if owner == part) for part in ('student', 'losses')}
        return dict(teachers=sum(x.nbytes() for x in read.values()), **saved), (student, teachers)

    def _flops(self, name: str, student: ViTOutput, teachers: dict[str, ViTOutput]) -> int:
        """Of a loss's forward and backward."""
        # Fused attention on CPUs is not among what the counter knows.
        with self._mode, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            leaves = replace(student, taps={key: x.detach().requires_grad_() for key, x in student.taps.items()})
            with self._autocast():
                loss = self._distiller.losses[name](leaves, teachers[name])
            loss.backward()
        return counter.get_total_flops()


def _storages(tensors: Iterable[Tensor]) -> dict:
    """Identity -> storage of each, so that views of one are counted once."""
    return {storage._cdata: storage for storage in (x.untyped_storage() for x in tensors)}
