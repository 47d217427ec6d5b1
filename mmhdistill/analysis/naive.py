"""Hybrid distillation as one would first write it: the reference that :mod:`.benchmark` compares with.

Eager attention whose maps are kept for backward, relations as N x N tensors, every token, teachers run to their end.
"""
import math

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor

from ..functional import feature_distance, token_relation, whiten
from ..models import FeatureLoss, HybridDistiller, TokenRelationLoss
from ..models.taps import ViTOutput
from ..models.vit import Positions, embed


def naive_losses(distiller: HybridDistiller, images: Tensor) -> dict[str, Tensor]:
    """What ``distiller.loss(images)`` returns without a masker, for feature losses and relation losses (``kl``).

    Teachers are :class:`ViTTeacher` with the student's grid.
    """
    student = naive_encode(distiller.backbone, images)
    with torch.no_grad():
        teachers = {name: naive_encode(teacher.vit, images * teacher.scale + teacher.shift, teacher._position)
                    for name, teacher in distiller.teachers.items()}
    values = {}
    for name, loss in distiller.losses.items():
        teacher = teachers[distiller._reads[name]]
        if isinstance(loss, FeatureLoss):
            target = teacher.patches(loss._teacher_layer, 'features')
            prediction = loss.projector(student.patches(loss._layer, 'features'))
            value = feature_distance(prediction, whiten(target), loss.distance, loss.smooth_l1_beta)
        elif isinstance(loss, TokenRelationLoss) and loss.distance == 'kl':
            value = sum(weight * naive_relation_kl(
                *(student.patches(ours, part) for part in kind), *(teacher.patches(theirs, part) for part in kind),
                loss.relation_heads, loss.temperature)
                for ours, theirs in loss.layers for kind, weight in loss.kinds.items())
        else:
            raise ValueError(f'the naive way is written for feature and KL relation losses, not for {name}: '
                             f'{type(loss).__name__}.')
        values[f'loss/{name}'] = loss.loss_weight * value
    return values


def naive_relation_kl(a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, heads: int,
                      temperature: float = 1.0) -> Tensor:
    """:func:`mmhdistill.functional.relation_kl` by its formula."""
    student = F.log_softmax(token_relation(a, b, heads).float() / temperature, dim=-1)
    teacher = F.softmax(token_relation(teacher_a, teacher_b, heads).float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction='none').sum(dim=-1).mean()


def naive_encode(vit: VisionTransformer, images: Tensor, positions: Positions | None = None) -> ViTOutput:
    """Every layer's q, k and v, and the features."""
    tokens, grid = embed(vit, images, positions)
    taps = {}
    for index, block in enumerate(vit.layers):
        attn = block.attn
        parts = attn.qkv(block.ln1(tokens)).chunk(3, dim=-1)
        taps.update({(index, kind): part for kind, part in zip('qkv', parts)})
        q, k, v = (part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        y = (attention @ v).transpose(1, 2).flatten(2)
        tokens = tokens + attn.out_drop(attn.gamma1(attn.proj_drop(attn.proj(y))))
        tokens = block.ffn(block.ln2(tokens), identity=tokens)
    taps[len(vit.layers) - 1, 'features'] = vit.ln1(tokens)
    return ViTOutput(taps, vit.num_extra_tokens, grid)
