from dataclasses import fields
from functools import partial

import torch
from mmengine.logging import MMLogger
from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...registry import MODELS
from ..flops import encoder_flops
from ..taps import Taps, ViTOutput, ViTSpec
from ..teachers.card import TeacherCard
from ..teachers.cards import find_card
from ..teachers.loading import WeightFile
from ..teachers.receipt import Receipt
from ..vit import Reducer, encode, ready_to_compile, run_block, unused_parameters, vit_spec


@MODELS.register_module()
class MaskableVisionTransformer(VisionTransformer):
    """The student: ``mmpretrain.VisionTransformer`` that can also be run on a part of its tokens.

    Arguments, parameter names and ``forward`` are those of the base class, so its checkpoint *is* one of
    ``mmpretrain.VisionTransformer`` (``out_type`` raw, cls_token or featmap, with the final norm).

    Args:
        init_from: weights to start from, of another model of this architecture: a dict of ``card`` and, if it is not
            the card's own file, ``checkpoint``, ``sha256``, ``entry``, ``prefix``, as for a :class:`ViTTeacher`.
            Loading is strict; positions follow the student's grid by the card's rule. ``checkpoint=None`` keeps random
            weights, for tests.
        with_cp: keep no more than each block's input, q, k and v for backward, and compute the block again there
            (activation checkpointing): less memory, a third more arithmetic of the student.
    """

    def __init__(self, *args, init_from: dict | None = None, with_cp: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.with_cp = with_cp
        ready_to_compile(self)
        self.init_from: WeightFile | None = None
        self.receipt: Receipt | None = None
        if init_from:
            if not isinstance(init_from, dict) or 'card' not in init_from:
                given = sorted(init_from) if isinstance(init_from, dict) else repr(init_from)
                raise ValueError(f'init_from names no card, only {given}: give dict(card=...), the card of the weights '
                                 'that the student starts from.')
            if unknown := sorted(set(init_from) - {field.name for field in fields(WeightFile)}):
                raise ValueError(f'init_from does not know {unknown}: it takes '
                                 f'{[field.name for field in fields(WeightFile)]}.')
            if isinstance(self.init_cfg, dict) and self.init_cfg['type'] == 'Pretrained':
                raise ValueError('both init_from and init_cfg say what the student starts from: give one of them.')
            self.init_from = WeightFile(**{**init_from, 'card': find_card(init_from['card'])})
        if not self.final_norm or self.out_type == 'avg_featmap':
            raise ValueError('MaskableVisionTransformer needs final_norm=True and out_type raw, cls_token or featmap, '
                             'so that its checkpoint fits the backbones it is transferred to; got final_norm='
                             f"{self.final_norm}, out_type='{self.out_type}'.")

    @property
    def spec(self) -> ViTSpec:
        return vit_spec(self)

    def init_weights(self) -> None:
        super().init_weights()
        if self.init_from is not None and self.init_from.checkpoint is None:
            MMLogger.get_current_instance().warning(
                'the student starts from random weights (init_from.checkpoint=None): good for trying things out only')
        elif self.init_from is not None:
            self._start()

    def check_start(self) -> None:
        """Raise ValueError unless the weights that it starts from are of this architecture; they are not read."""
        if self.init_from is not None and self.init_from.checkpoint is not None:
            _check_same_architecture(self, self.init_from.card)

    @torch.no_grad()
    def _start(self) -> None:
        self.check_start()
        own, card = self.state_dict(), self.init_from.card
        tensors, self.receipt = self.init_from.read('backbone', role='student')
        for key, tensor in tensors:
            own[key].copy_(card.positions(tensor, tuple(self.patch_resolution)) if key == 'pos_embed' else tensor)
        MMLogger.get_current_instance().info(str(self.receipt))

    def encode(self, images: Tensor, taps: Taps, reduce: Reducer | None = None) -> ViTOutput:
        """Run as deep as ``taps`` ask on the tokens that ``reduce`` leaves; see :func:`mmhdistill.models.vit.encode`.

        Args:
            images: (B, 3, H, W), normalised; H and W multiples of the patch size.
        """
        run = partial(checkpoint, run_block, use_reentrant=False) if self.with_cp and torch.is_grad_enabled() else None
        return encode(self, images, taps, reduce, run=run)

    def flops(self, patches: list[int], taps: Taps, grid: tuple[int, int] | None = None) -> int:
        """Of one image's forward, when block l sees ``patches[l]`` patches of ``grid``, by default the nominal one."""
        rows, columns = grid or self.patch_resolution
        tokens = [count + self.num_extra_tokens for count in patches]
        return encoder_flops(self.patch_embed, self.layers, self.embed_dims, rows * columns, tokens, taps)

    def freeze_unused(self, taps: Taps) -> list[str]:
        """Turn off the gradient of what no tap reaches, and name it; DDP then needs no ``find_unused_parameters``."""
        names = unused_parameters(self, taps)
        for name in names:
            self.get_parameter(name).requires_grad_(False)
        return names


def _check_same_architecture(vit: VisionTransformer, card: TeacherCard) -> None:
    """Raise ValueError unless the weights of ``card`` mean the same in ``vit``."""
    with torch.device('meta'):
        other = card.build()
    facts = [{
        'heads': model.arch_settings['num_heads'],
        'activation': str(model.layers[0].ffn.layers[0][1]) if hasattr(model.layers[0].ffn, 'layers') else 'gated',
        'eps of norms': model.layers[0].ln1.eps,
        **{key: tuple(x.shape) for key, x in model.state_dict().items() if key != 'pos_embed'}
    } for model in (other, vit)]
    theirs, ours = facts
    wrong = [f'{name}: {theirs.get(name, "none")} there, {ours.get(name, "none")} here'
             for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if wrong:
        raise ValueError(f"the student cannot start from '{card.name}', a ViT of another architecture ({len(wrong)} "
                         f'differences; {"; ".join(wrong[:3])}): give it the arch, patch size and tokens of that card, '
                         'or leave init_from out.')
