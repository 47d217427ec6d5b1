from torch import Tensor

from ...functional import dropped_ids, gather_tokens
from ...registry import MODELS
from ..taps import ViTOutput, ViTSpec
from .feature_loss import FeatureLoss


@MODELS.register_module()
class MaskedFeatureLoss(FeatureLoss):
    """Masked feature reconstruction (MVP, MaskDistill, dBOT): the teacher's final features at the *dropped* patches,
    predicted by a decoder from those that the student saw.

    Hybrid Distill (arXiv 2306.15876) analyses this design: an asymmetric decoder raises the diversity of attention and
    may cost discrimination, so the decoder's depth is a setting. Target and distance: :class:`FeatureLoss`'s [choice].

    Args:
        decoder: config of the decoder; a :class:`MaskDecoder` if None.
        student, teacher, distance, smooth_l1_beta, normalize_target, loss_weight: see :class:`FeatureLoss`.
    """

    def __init__(self, student: ViTSpec, teacher: ViTSpec, decoder: dict | None = None, distance: str = 'smooth_l1',
                 smooth_l1_beta: float = 2.0, normalize_target: bool = True, loss_weight: float = 1.0,
                 init_cfg: dict | None = None):
        super().__init__(student, teacher, projector=decoder or dict(type='mmhdistill.MaskDecoder'), distance=distance,
                         smooth_l1_beta=smooth_l1_beta, normalize_target=normalize_target, loss_weight=loss_weight,
                         init_cfg=init_cfg)

    def forward(self, student: ViTOutput, teacher: ViTOutput) -> Tensor:
        """Weighted scalar loss."""
        keep_ids = student.keep_ids.get(self._layer)
        if keep_ids is None:
            raise ValueError('MaskedFeatureLoss predicts the patches that the student did not see, and it saw all of '
                             'them: give the model a masker with a keep rate below 1, for example '
                             "dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.25, "
                             "scorer=dict(type='mmhdistill.RandomScorer')).")
        dropped = dropped_ids(keep_ids, student.grid[0] * student.grid[1])
        prediction = self.projector(
            student.extra(self._layer, 'features'), student.patches(self._layer, 'features'), keep_ids, student.grid)
        target = teacher.patches(self._teacher_layer, 'features', dropped, grid=student.grid)
        return self._distance(gather_tokens(prediction, dropped), target)
