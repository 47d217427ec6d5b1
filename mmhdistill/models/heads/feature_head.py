from mmengine.model import BaseModule
from mmengine.structures import BaseDataElement
from torch import Tensor

from ...registry import MODELS


@MODELS.register_module()
class FeatureHead(BaseModule):
    """Hands on a ViT's features instead of classifying them: the head of an ``mmpretrain.ImageClassifier`` that
    :class:`mmhdistill.evaluation.KNNMetric` measures. It learns nothing, and has no loss.

    Args:
        num_extra_tokens: tokens before the patches, of which the first is the class token.
    """

    def __init__(self, num_extra_tokens: int = 1):
        super().__init__()
        self.num_extra_tokens = num_extra_tokens

    def predict(self, feats: tuple[Tensor, ...],
                data_samples: list[BaseDataElement] | None = None) -> list[BaseDataElement]:
        """Each sample gets ``feature``, the mean patch token (C,), and, where there is one, ``cls_feature``.

        Args:
            feats: of a backbone with ``out_type='raw'``; the last, (B, N, C), is read.
        """
        tokens = feats[-1]
        if tokens.ndim != 3:
            raise ValueError(f'FeatureHead needs all tokens, (B, N, C), and got {tuple(tokens.shape)}: give the '
                             "backbone out_type='raw'.")
        patches = tokens[:, self.num_extra_tokens:].mean(dim=1)
        data_samples = data_samples or [BaseDataElement() for _ in tokens]
        for index, sample in enumerate(data_samples):
            sample.set_data(dict(feature=patches[index]))
            if self.num_extra_tokens:
                sample.set_data(dict(cls_feature=tokens[index, 0]))
        return data_samples
