import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor

from ...functional import relation_kl, relation_smooth_l1
from ...registry import MODELS
from ..taps import ViTOutput, ViTSpec, merge_taps

_KINDS = ('qk', 'vv', 'qq', 'kk')


def default_layer_pairs(student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Layers 8, 9, 10 of 12 counted from 0, at the same depth fractions of other depths [choice].

    The later-but-not-last layers; the last is left to the feature loss.
    """
    pairs = [tuple(math.floor(i * depth / 12) - 1 for depth in (student_depth, teacher_depth)) for i in (9, 10, 11)]
    return sorted({(max(s, 0), max(t, 0)) for s, t in pairs})


@MODELS.register_module()
class TokenRelationLoss(BaseModule):
    """The diversity term: distance of token relations between teacher and student at intermediate layers.

    Hybrid Distill (arXiv 2306.15876) learns the relations of the masked-image-modelling teacher, not its features.
    With masking, rows and columns of the kept tokens are selected before the softmax, so each row is a distribution
    over the kept tokens.

    Args:
        student, teacher: specs of the two models; given by the distiller.
        layers: (student layer, teacher layer) pairs, counted from 0; :func:`default_layer_pairs` if None.
        kinds: which relations, with their weights: a dict of ``qk``, ``vv``, ``qq``, ``kk``, or one or a list of them
            for weights 1. The loss is their weighted sum, summed over the layer pairs.
        distance: ``kl`` (the TinyMIM form, our default) or ``smooth_l1`` on the raw scores (believed to be the paper's
            form, not verified) [choice].
        temperature: of both softmaxes of ``kl``.
        smooth_l1_beta: where SmoothL1 turns from quadratic to linear.
        relation_heads: heads that both widths are split into; may be left out where both models have equally many.
        include_extra: relations among extra tokens and patches (TinyMIM) instead of patches only.
        loss_weight: factor of the returned value; at 0 the distiller does not build the loss.
    """

    def __init__(self, student: ViTSpec, teacher: ViTSpec, layers: Sequence[tuple[int, int]] | None = None,
                 kinds: str | Sequence[str] | dict[str, float] = ('qk',), distance: str = 'kl',
                 temperature: float = 1.0, smooth_l1_beta: float = 1.0, relation_heads: int | None = None,
                 include_extra: bool = False, loss_weight: float = 1.0, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        self.kinds = dict(kinds) if isinstance(kinds, dict) else dict.fromkeys(kinds, 1.0)
        unknown = [kind for kind in self.kinds if kind not in _KINDS]
        if unknown:
            raise ValueError(f'unknown relation kinds {unknown}: choose at least one of {", ".join(_KINDS)}.')
        # A kind of weight 0 costs nothing.
        self.kinds = {kind: weight for kind, weight in self.kinds.items() if weight != 0}
        if not self.kinds:
            raise ValueError(f'no relation kind has a weight, got {kinds}: choose at least one of {", ".join(_KINDS)}.')
        if distance not in ('kl', 'smooth_l1'):
            raise ValueError(f"unknown relation distance '{distance}': choose kl or smooth_l1.")
        if include_extra and student.num_extra_tokens != teacher.num_extra_tokens:
            raise ValueError(f'include_extra=True needs equally many extra tokens, but the student has '
                             f'{student.num_extra_tokens} and the teacher {teacher.num_extra_tokens}: set it to False.')
        self.distance = distance
        self.temperature = temperature
        self.smooth_l1_beta = smooth_l1_beta
        self.relation_heads = _relation_heads(relation_heads, student, teacher)
        self.include_extra = include_extra
        self.loss_weight = loss_weight
        if layers is None:
            layers = default_layer_pairs(student.depth, teacher.depth)
        self.layers = [(student.layer(s, 'student'), teacher.layer(t, 'teacher')) for s, t in layers]
        if not self.layers:
            raise ValueError('layers is empty: give at least one (student layer, teacher layer) pair.')
        tapped = frozenset(''.join(self.kinds))
        self.student_taps = merge_taps({s: tapped} for s, _ in self.layers)
        self.teacher_taps = merge_taps({t: tapped} for _, t in self.layers)

    def forward(self, student: ViTOutput, teacher: ViTOutput) -> Tensor:
        """Weighted scalar loss."""
        total = 0.0
        for student_layer, teacher_layer in self.layers:
            keep_ids = student.keep_ids.get(student_layer)
            for kind, weight in self.kinds.items():
                ours = [self._tokens(student, student_layer, part, None, teacher.grid) for part in kind]
                theirs = [self._tokens(teacher, teacher_layer, part, keep_ids, teacher.grid) for part in kind]
                total = total + weight * self._distance(*ours, *theirs)
        return self.loss_weight * total

    def _tokens(self, output: ViTOutput, layer: int, part: str, keep_ids: Tensor | None,
                grid: tuple[int, int]) -> Tensor:
        patches = output.patches(layer, part, keep_ids, grid)
        return torch.cat([output.extra(layer, part), patches], dim=1) if self.include_extra else patches

    def _distance(self, *tokens: Tensor) -> Tensor:
        if self.distance == 'kl':
            return relation_kl(*tokens, heads=self.relation_heads, temperature=self.temperature)
        return relation_smooth_l1(*tokens, heads=self.relation_heads, beta=self.smooth_l1_beta)


def _relation_heads(heads: int | None, student: ViTSpec, teacher: ViTSpec) -> int:
    divisors = [r for r in range(1, min(student.embed_dims, teacher.embed_dims) + 1)
                if student.embed_dims % r == 0 and teacher.embed_dims % r == 0]
    if heads is None:
        if student.num_heads != teacher.num_heads:
            raise ValueError(f'the student has {student.num_heads} heads and the teacher {teacher.num_heads}: set '
                             f'relation_heads to a common divisor of their widths {student.embed_dims} and '
                             f'{teacher.embed_dims}, one of {divisors}.')
        heads = student.num_heads
    if heads not in divisors:
        raise ValueError(f'relation_heads={heads} does not divide both widths, {student.embed_dims} (student) and '
                         f'{teacher.embed_dims} (teacher): choose one of {divisors}.')
    return heads
