from dataclasses import replace

import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from ...registry import HOOKS
from .own_seed import own_seed


@HOOKS.register_module()
class DiversityReportHook(Hook):
    """Is it hybrid yet? Diversity of the student's layers while it is trained, on a fixed handful of images.

    Scalars for every visualizer backend, per layer from 0: ``diversity/nmi/layer_0``, ``distance`` (pixels), ``rank``
    of the patch tokens, and ``cka_<teacher>`` to the teacher's layer at the same share of its depth; the teachers' own
    are ``diversity/nmi_<teacher>/layer_0`` and so on. What they mean: :mod:`mmhdistill.functional`. Full images, no
    masker.

    Only the main process reports. The images, evenly spread over the training data, go through the training pipeline
    under a seed of their own, so that they are the same after a resume, and training draws the same random numbers
    with the hook and without.

    Args:
        interval: iterations between reports; the first comes before the first step.
        num_images: how many images.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 500, num_images: int = 8):
        if interval < 1 or num_images < 1:
            raise ValueError(f'interval={interval}, num_images={num_images}: give at least 1 of both.')
        self.interval = interval
        self.num_images = num_images

    def before_train(self, runner: Runner) -> None:
        if not is_main_process():
            return
        self._images = _images(_model(runner), runner.train_dataloader.dataset, self.num_images)
        self._teachers: dict | None = None
        if runner.iter == 0:
            self._report(runner, 0)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if is_main_process() and self.every_n_train_iters(runner, self.interval):
            self._report(runner, runner.iter + 1)

    @torch.no_grad()
    def _report(self, runner: Runner, step: int) -> None:
        from ...analysis.diversity import cka_to, diversity_taps, layer_statistics
        model = _model(runner)
        student, teachers = model.backbone, model.teachers
        training = student.training
        student.eval()
        output = student.encode(self._images, diversity_taps(student.spec))
        student.train(training)
        if self._teachers is None:
            self._teachers, constant = {}, {}
            for name, teacher in teachers.items():
                theirs = teacher(self._images, output.grid, diversity_taps(teacher.spec))
                # Distances are in pixels of the student's images, of which the teacher sees the same patches.
                spec = replace(teacher.spec, patch_size=student.spec.patch_size)
                constant.update({f'{kind}_{name}': values
                                 for kind, values in layer_statistics(theirs, spec).items()})
                hidden = {key: x for key, x in theirs.taps.items() if key[1] == 'hidden'}
                self._teachers[name] = replace(theirs, taps=hidden)
            self._constant = _scalars(constant)
        found = layer_statistics(output, student.spec)
        for name, theirs in self._teachers.items():
            found[f'cka_{name}'] = cka_to(output, student.spec.depth, theirs, teachers[name].spec.depth)
        runner.visualizer.add_scalars({**_scalars(found), **self._constant}, step=step)


def _scalars(found: dict[str, list]) -> dict[str, float]:
    return {f'diversity/{kind}/layer_{layer}': float(torch.as_tensor(value).mean())
            for kind, values in found.items() for layer, value in enumerate(values)}


def _model(runner: Runner):
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not hasattr(model, 'teachers') or not hasattr(getattr(model, 'backbone', None), 'encode'):
        raise ValueError(f'DiversityReportHook reads the student and the teachers of a HybridDistiller, and the model '
                         f'is a {type(model).__name__}: leave the hook out.')
    return model


def _images(model, dataset, number: int) -> Tensor:
    indices = torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long().tolist()
    with own_seed():
        batch = pseudo_collate([dataset[index] for index in indices])
    return model.data_preprocessor(batch, False)['inputs']
