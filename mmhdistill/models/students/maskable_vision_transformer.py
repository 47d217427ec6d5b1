from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor

from ...registry import MODELS
from ..flops import encoder_flops
from ..taps import Taps, ViTOutput, ViTSpec
from ..vit import Reducer, encode, unused_parameters, vit_spec


@MODELS.register_module()
class MaskableVisionTransformer(VisionTransformer):
    """The student: ``mmpretrain.VisionTransformer`` that can also be run on a part of its tokens.

    Arguments, parameter names and ``forward`` are those of the base class, so its checkpoint *is* one of
    ``mmpretrain.VisionTransformer`` (``out_type`` raw, cls_token or featmap, with the final norm).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.final_norm or self.out_type == 'avg_featmap':
            raise ValueError('MaskableVisionTransformer needs final_norm=True and out_type raw, cls_token or featmap, '
                             'so that its checkpoint fits the backbones it is transferred to; got final_norm='
                             f"{self.final_norm}, out_type='{self.out_type}'.")

    @property
    def spec(self) -> ViTSpec:
        return vit_spec(self)

    def encode(self, images: Tensor, taps: Taps, reduce: Reducer | None = None) -> ViTOutput:
        """Run as deep as ``taps`` ask on the tokens that ``reduce`` leaves; see :func:`mmhdistill.models.vit.encode`.

        Args:
            images: (B, 3, H, W), normalised; H and W multiples of the patch size.
        """
        return encode(self, images, taps, reduce)

    def flops(self, patches: list[int], taps: Taps) -> int:
        """Of one image's forward at the nominal image size, when block l sees ``patches[l]`` patches."""
        full = self.patch_resolution[0] * self.patch_resolution[1]
        tokens = [count + self.num_extra_tokens for count in patches]
        return encoder_flops(self.patch_embed, self.layers, self.embed_dims, full, tokens, taps)

    def freeze_unused(self, taps: Taps) -> list[str]:
        """Turn off the gradient of what no tap reaches, and name it; DDP then needs no ``find_unused_parameters``."""
        names = unused_parameters(self, taps)
        for name in names:
            self.get_parameter(name).requires_grad_(False)
        return names
