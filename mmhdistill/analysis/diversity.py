"""How diverse the layers of a ViT are, from what was tapped of one forward."""
import torch
from torch import Tensor

from ..functional import attention_statistics, effective_rank, linear_cka
from ..models.taps import Taps, ViTOutput, ViTSpec


def diversity_taps(spec: ViTSpec) -> Taps:
    """What :func:`layer_statistics` reads."""
    return {layer: frozenset({'q', 'k', 'hidden'}) for layer in range(spec.depth)}


def layer_statistics(output: ViTOutput, spec: ViTSpec) -> dict[str, list[Tensor]]:
    """:func:`attention_by_layer`, and :func:`rank_by_layer` as ``rank``."""
    return dict(attention_by_layer(output, spec), rank=rank_by_layer(output, spec))


@torch.no_grad()
def attention_by_layer(output: ViTOutput, spec: ViTSpec) -> dict[str, list[Tensor]]:
    """Per layer, ``nmi`` and ``distance`` (pixels of the model's own images) of each head, (H,), means over images.
    See :mod:`mmhdistill.functional`; attention is formed one layer at a time."""
    found = [attention_statistics(output.taps[layer, 'q'], output.taps[layer, 'k'], spec.num_heads, output.grid,
                                  spec.patch_size, output.num_extra_tokens) for layer in range(spec.depth)]
    return {name: [values[name] for values in found] for name in ('nmi', 'distance')}


@torch.no_grad()
def rank_by_layer(output: ViTOutput, spec: ViTSpec) -> list[Tensor]:
    """Effective rank of the patch tokens of all images, per layer a scalar."""
    return [effective_rank(output.patches(layer, 'hidden').flatten(0, 1)) for layer in range(spec.depth)]


@torch.no_grad()
def cka_to(student: ViTOutput, depth: int, teacher: ViTOutput, teacher_depth: int) -> list[float]:
    """Linear CKA of the patch tokens of each student layer with the teacher's layer at the same share of its depth.

    Another grid than the student's is resampled to it, bilinearly.
    """
    pairs = [(layer, max(round((layer + 1) * teacher_depth / depth), 1) - 1) for layer in range(depth)]
    grid = None if teacher.grid == student.grid else student.grid
    return [linear_cka(student.patches(ours, 'hidden').flatten(0, 1),
                       teacher.patches(theirs, 'hidden', grid=grid).flatten(0, 1)).item() for ours, theirs in pairs]
