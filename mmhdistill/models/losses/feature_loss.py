import torch
from mmengine.model import BaseModule
from torch import Tensor

from ...functional import feature_distance, whiten
from ...registry import MODELS
from ..taps import ViTOutput, ViTSpec


@MODELS.register_module()
class FeatureLoss(BaseModule):
    """The discrimination term: D(whiten(teacher's final features), P(student's final features)) at the kept tokens.

    Hybrid Distill (arXiv 2306.15876) takes the final features of the contrastive or supervised teacher at all kept
    tokens; the whitened target, the linear P and SmoothL1 with beta 2.0 are Feature Distillation's (arXiv 2205.14141)
    [choice].

    Args:
        student, teacher: specs of the two models; given by the distiller.
        projector: config of P.
        distance: ``smooth_l1``, ``cosine`` or ``mse``.
        smooth_l1_beta: where SmoothL1 turns from quadratic to linear.
        normalize_target: LayerNorm without affine on the target.
        include_cls: compare the class tokens too, where both models have one.
        loss_weight: factor of the returned value; at 0 the distiller does not build the loss.
    """

    def __init__(self, student: ViTSpec, teacher: ViTSpec, projector: dict | None = None, distance: str = 'smooth_l1',
                 smooth_l1_beta: float = 2.0, normalize_target: bool = True, include_cls: bool = False,
                 loss_weight: float = 1.0, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if distance not in ('smooth_l1', 'cosine', 'mse'):
            raise ValueError(f"unknown feature distance '{distance}': choose smooth_l1, cosine or mse.")
        without = [name for name, spec in (('student', student), ('teacher', teacher)) if not spec.has_class_token]
        if include_cls and without:
            raise ValueError(f'include_cls=True compares class tokens, but the {" and the ".join(without)} has none: '
                             'set it to False, or give both a class token.')
        self.projector = MODELS.build({
            **(projector or dict(type='mmhdistill.LinearProjector')), 'in_channels': student.embed_dims,
            'out_channels': teacher.embed_dims
        })
        self.distance = distance
        self.smooth_l1_beta = smooth_l1_beta
        self.normalize_target = normalize_target
        self.include_cls = include_cls
        self.loss_weight = loss_weight
        self._layer, self._teacher_layer = student.depth - 1, teacher.depth - 1
        self.student_taps = {self._layer: frozenset({'features'})}
        self.teacher_taps = {self._teacher_layer: frozenset({'features'})}

    def forward(self, student: ViTOutput, teacher: ViTOutput) -> Tensor:
        """Weighted scalar loss."""
        keep_ids = student.keep_ids.get(self._layer)
        prediction = student.patches(self._layer, 'features', grid=teacher.grid)
        target = teacher.patches(self._teacher_layer, 'features', keep_ids)
        if self.include_cls:
            prediction = torch.cat([student.extra(self._layer, 'features')[:, :1], prediction], dim=1)
            target = torch.cat([teacher.extra(self._teacher_layer, 'features')[:, :1], target], dim=1)
        return self._distance(self.projector(prediction), target)

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        target = whiten(target) if self.normalize_target else target.float()
        return self.loss_weight * feature_distance(prediction, target, self.distance, self.smooth_l1_beta)
