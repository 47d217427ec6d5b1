import math
from collections.abc import Callable

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ...registry import MODELS
from ..taps import Taps, ViTOutput, merge_taps
from ..teachers import FrozenTeachers
from ..teachers.card import check_normalisation


@MODELS.register_module()
class HybridDistiller(BaseModel):
    """A student x a token masker x a named dict of frozen teachers x a named dict of losses.

    Hybrid Distill (arXiv 2306.15876):
    ``L = a D_feat(T_c(x)[M], P(S(x[M]))) + b sum_l D_rel(R_m(x)[M, M], R_s(x[M]))``, a = b = 1. Other methods are other
    configs of this class.

    A loss of weight 0, or set to None, is not built; a teacher that no loss reads is not built, loaded or run.

    Args:
        backbone: config of the student, a :class:`MaskableVisionTransformer`.
        teachers: name -> config of a frozen teacher.
        losses: name -> config of a loss, with the ``teacher`` it reads. It returns ``loss/<name>``, weighted.
        masker: config of a token masker; None feeds the student every token.
        data_preprocessor: must normalise images with a ``mean`` and ``std`` in 0-255, RGB: teachers undo it.
    """

    predicts_teachers = False

    def __init__(self, backbone: dict, teachers: dict[str, dict], losses: dict[str, dict], masker: dict | None = None,
                 data_preprocessor: dict | nn.Module | None = None, init_cfg: dict | None = None):
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        _check_teachers(teachers)
        _check_types(losses)
        losses = {name: dict(cfg) for name, cfg in losses.items() if cfg and cfg.get('loss_weight', 1.0) != 0}
        if not losses:
            raise ValueError('every loss is None or has weight 0: give at least one loss a weight.')
        self._reads = {name: _pop_teacher(name, cfg, teachers) for name, cfg in losses.items()}
        self.masker = MODELS.build(masker) if masker else None
        _check_scoring_teacher(self.masker, teachers, set(self._reads.values()))
        _check_masked_teachers(self.masker, {name: teachers[name] for name in self._reads.values()})
        mean, std = _normalisation(self.data_preprocessor)
        _check_start(self.backbone, mean, std)
        self.teachers = FrozenTeachers({
            name: MODELS.build({**cfg, 'name': name, 'input_mean': mean, 'input_std': std})
            for name, cfg in teachers.items() if name in self._reads.values()
        })
        idle = [name for name, cfg in teachers.items() if cfg and name not in self.teachers]
        if idle:
            MMLogger.get_current_instance().info(f'no loss reads teachers {idle}: they are neither built nor loaded')
        student = self.backbone.spec
        self.losses = nn.ModuleDict({
            name: MODELS.build({**cfg, 'student': student, 'teacher': self.teachers[self._reads[name]].spec})
            for name, cfg in losses.items()
        })
        learned = self._plan_taps()
        unused = self.backbone.freeze_unused(learned)
        if unused:
            MMLogger.get_current_instance().info(
                f'{len(unused)} student tensors get no gradient from these losses and are frozen: {", ".join(unused)}')

    def _plan_taps(self) -> Taps:
        """Each model runs as deep as its losses ask; returns what they read of the student."""
        learned = merge_taps([loss.student_taps for loss in self.losses.values()])
        student = [learned]
        teacher = {name: [] for name in self.teachers}
        for name, loss in self.losses.items():
            teacher[self._reads[name]].append(loss.teacher_taps)
        if self.masker is not None:
            if self.masker.teacher is not None:
                self.masker.bind(self.teachers[self.masker.teacher].spec)
                teacher[self.masker.teacher].append(self.masker.taps)
            else:
                self.masker.bind(self.backbone.spec)
                # A later stage would drop tokens that no loss sees.
                student.append({layer: kinds for layer, kinds in self.masker.taps.items() if layer < max(learned)})
        self._student_taps = merge_taps(student)
        self._teacher_taps = {name: merge_taps(parts) for name, parts in teacher.items()}
        return learned

    def init_weights(self) -> None:
        """Initialise the student, load the teachers and print a receipt of each."""
        super().init_weights()
        receipts = [teacher.load() for teacher in self.teachers.values()]
        runs = self._describe_runs()
        for receipt in receipts:
            told, receipt.run = bool(receipt.run), runs[receipt.name]
            if not told:
                MMLogger.get_current_instance().info(str(receipt))

    @property
    def manifest(self) -> dict[str, dict]:
        """Receipts of the teachers, and of what the student started from, by name: for the record of a run."""
        loaded = {**self.teachers, 'backbone': self.backbone}
        return {name: model.receipt.as_dict() for name, model in loaded.items() if model.receipt}

    def _describe_runs(self) -> dict[str, dict]:
        """Per teacher, at the student's nominal image size; a training step is three forwards of the student."""
        student, runs = self.arithmetic(tuple(self.backbone.patch_resolution))
        step = sum(run['gflops'] for run in runs.values()) + 3 * student / 1e9
        for run in runs.values():
            run['share'] = run['gflops'] / step
        return runs

    def arithmetic(self, grid: tuple[int, int]) -> tuple[int, dict[str, dict]]:
        """FLOPs of one image's forward of the student, and how each teacher runs, :meth:`Teacher.describe_run`.

        Args:
            grid: rows and columns of patches that the student cuts the images into.
        """
        kept = self.kept_by_layer(grid)
        runs = {name: teacher.describe_run(grid, self._teacher_taps[name], kept[0] if teacher.masked else None)
                for name, teacher in self.teachers.items()}
        return self.backbone.flops(kept, self._student_taps, grid), runs

    def kept_by_layer(self, grid: tuple[int, int]) -> list[int]:
        """Patches of ``grid`` that each of the student's blocks sees at the masker's present keep rate."""
        patches, depth = grid[0] * grid[1], self.backbone.spec.depth
        return self.masker.kept_by_layer(patches, depth) if self.masker else [patches] * depth

    def _apply(self, fn: Callable, recurse: bool = True):
        """Teachers are outside the module tree and still follow ``.to()``, ``.half()`` and the like of their owner."""
        super()._apply(fn, recurse)
        if self.teachers.owned:
            for teacher in self.teachers.values():
                teacher._apply(fn)
        return self

    def forward(self, inputs: Tensor, data_samples: list[BaseDataElement] | None = None, mode: str = 'tensor'):
        """
        Args:
            inputs: (B, 3, H, W) images, normalised by the data preprocessor.
            mode: ``loss`` returns a dict of losses; ``tensor`` what the backbone returns; ``predict`` the data
                samples with ``feature`` (mean patch token after the final norm, (C,)) and, where there is one,
                ``cls_feature``, of the full image; while :attr:`predicts_teachers` is set, also
                ``teacher_features``, a dict of each teacher's mean patch token.
        """
        if mode == 'loss':
            return self.loss(inputs)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        if mode == 'tensor':
            return self.backbone(inputs)
        raise ValueError(f"unknown mode '{mode}': choose loss, predict or tensor.")

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        """One scalar per loss, named ``loss/<name>``."""
        student, teachers = self.encode(images)
        return {f'loss/{name}': loss(student, teachers[name]) for name, loss in self.losses.items()}

    def encode(self, images: Tensor) -> tuple[ViTOutput, dict[str, ViTOutput]]:
        """What the losses read of the student, and of the teacher of each, by the loss's name."""
        grid = tuple(side // self.backbone.spec.patch_size for side in images.shape[-2:])
        outputs = {name: teacher(images, grid, self._teacher_taps[name])
                   for name, teacher in self.teachers.items() if not teacher.masked}
        reduce = None
        if self.masker is not None:
            scoring = outputs.get(self.masker.teacher)
            if scoring is not None and scoring.grid != grid:
                own, theirs = ('x'.join(map(str, sides)) for sides in (grid, scoring.grid))
                raise ValueError(f"teacher '{self.masker.teacher}' scores the tokens of the student's {own} patches, "
                                 f'but sees a grid of its own, {theirs}: leave its image_size out.')
            reduce = self.masker.reducer(len(images), grid[0] * grid[1], images.device, scoring)
        student = self.backbone.encode(images, self._student_taps, reduce)
        outputs.update((name, teacher(images, grid, self._teacher_taps[name], student.keep_ids[0]))
                       for name, teacher in self.teachers.items() if teacher.masked)
        return student, {loss: outputs[teacher] for loss, teacher in self._reads.items()}

    @torch.no_grad()
    def predict(self, images: Tensor, data_samples: list[BaseDataElement] | None = None) -> list[BaseDataElement]:
        last = self.backbone.spec.depth - 1
        output = self.backbone.encode(images, {last: frozenset({'features'})})
        patches, extra = output.patches(last, 'features').mean(dim=1), output.extra(last, 'features')
        theirs = self._predict_teachers(images, output.grid) if self.predicts_teachers else {}
        data_samples = data_samples or [BaseDataElement() for _ in images]
        for index, sample in enumerate(data_samples):
            sample.set_data(dict(feature=patches[index]))
            if extra.shape[1]:
                sample.set_data(dict(cls_feature=extra[index, 0]))
            if theirs:
                sample.set_data(dict(teacher_features={name: x[index] for name, x in theirs.items()}))
        return data_samples

    def _predict_teachers(self, images: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        found = {}
        for name, teacher in self.teachers.items():
            last = teacher.spec.depth - 1
            output = teacher(images, grid, {last: frozenset({'features'})})
            found[name] = output.patches(last, 'features').mean(dim=1)
        return found


def _check_teachers(teachers: dict) -> None:
    for name, cfg in teachers.items():
        if cfg and 'type' not in cfg:
            complete = [other for other, cfg in teachers.items() if cfg and 'type' in cfg]
            raise ValueError(f"teacher '{name}' has no type, only {sorted(cfg)}: give it one, or correct its name if "
                             f'one of {complete} is meant.')


def _pop_teacher(loss: str, cfg: dict, teachers: dict) -> str:
    active = [name for name, teacher in teachers.items() if teacher]
    name = cfg.pop('teacher', None)
    if name not in active:
        raise ValueError(f"loss '{loss}' reads teacher {name!r}, which is not there: the teachers are {active}.")
    return name


def _check_types(losses: dict[str, dict]) -> None:
    for name, cfg in losses.items():
        if cfg and 'type' not in cfg:
            known = [other for other, own in losses.items() if own and 'type' in own]
            raise ValueError(f"loss '{name}' has no type, only {sorted(cfg)}: the losses of this config are {known}. "
                             'An option of a name that is not there makes a new loss: correct the name, or give it a '
                             'type.')


def _check_scoring_teacher(masker, teachers: dict, running: set[str]) -> None:
    if masker is None or masker.teacher is None or masker.teacher in running:
        return
    if masker.teacher in teachers:
        raise ValueError(f"the masker scores tokens with teacher '{masker.teacher}', which is switched off because no "
                         f'loss with a weight reads it: set masker.teacher to one of {sorted(running)}.')
    raise ValueError(f"the masker scores tokens with teacher '{masker.teacher}', which is not there: set "
                     f'masker.teacher to one of {sorted(running)}.')


def _check_masked_teachers(masker, teachers: dict) -> None:
    masked = [name for name, cfg in teachers.items() if cfg.get('masked')]
    if masked and (masker is None or masker.place != 'input'):
        raise ValueError(f"teacher '{masked[0]}' is masked, but tokens are "
                         + ("dropped inside the student: set the masker's place to 'input'" if masker else
                            'not dropped: give a masker') + ', or set masked=False.')
    if masked and masker.teacher in masked:
        raise ValueError(f"the masker scores the tokens of the full image with teacher '{masker.teacher}', which is "
                         "fed the kept ones alone: score with another teacher, or set masked=False.")


def _check_start(backbone: nn.Module, mean: list[float], std: list[float]) -> None:
    file = getattr(backbone, 'init_from', None)
    if file is None or all(math.isclose(a, b, rel_tol=1e-3) for given, own in ((mean, file.card.mean), (
            std, file.card.std)) for a, b in zip(given, own)):
        return
    raise ValueError(f"the student starts from '{file.card.name}', which was trained on images of mean "
                     f'{list(file.card.mean)} and std {list(file.card.std)}, but is fed mean {mean} and std {std}: '
                     "give data_preprocessor the card's.")


def _normalisation(preprocessor: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and std of the student's images, per channel in 0-255."""
    if getattr(preprocessor, 'mean', None) is None or getattr(preprocessor, 'std', None) is None:
        raise ValueError(f'{type(preprocessor).__name__} does not normalise images, so teachers cannot tell what they '
                         "are fed: give data_preprocessor a mean and std in 0-255, for example dict(type="
                         "'ImgDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], "
                         'bgr_to_rgb=True).')
    mean, std = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    check_normalisation(mean, std, 'data_preprocessor')
    if getattr(preprocessor, '_channel_conversion', True) is False:
        MMLogger.get_current_instance().warning(
            'data_preprocessor does not turn BGR into RGB, and images are loaded as BGR by default: unless the '
            'pipeline loads RGB, teachers see the wrong channels; set bgr_to_rgb=True.')
    return mean, std
