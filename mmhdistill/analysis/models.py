"""Frozen models under the microscope: features, attention and relations on a fixed set of images."""
import mmcv
import torch
from torch import Tensor

from ..datasets import ImageFolder
from ..functional import attention_from_qk, attention_nmi, relation_kl
from ..models import ViTTeacher
from ..models.taps import ViTOutput, merge_taps


def load_images(folder: str) -> tuple[Tensor, Tensor]:
    """All images of a labelled folder, (M, 3, H, W) RGB in 0-255, and their classes (M,)."""
    dataset = ImageFolder(folder, with_label=True, pipeline=[])
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    images = [torch.from_numpy(mmcv.imread(info['img_path'], channel_order='rgb')) for info in infos]
    return torch.stack(images).permute(0, 3, 1, 2), torch.tensor([info['gt_label'] for info in infos])


@torch.no_grad()
def run(model: ViTTeacher, images: Tensor, kinds: set[str], layers: list[int]) -> ViTOutput:
    """Tap ``model``, built with ``input_mean=[0, 0, 0], input_std=[1, 1, 1]``, on RGB images in 0-255."""
    grid = tuple(side // model.spec.patch_size for side in images.shape[-2:])
    return model(images.float(), grid, {layer: frozenset(kinds) for layer in layers})


def readouts(model: ViTTeacher, images: Tensor, batch: int = 512) -> dict[str, Tensor]:
    """After the final norm: ``patch``, the mean patch token, and ``cls``, the class token, both (M, C)."""
    last = model.spec.depth - 1
    outputs = [run(model, part, {'features'}, [last]) for part in images.split(batch)]
    return dict(patch=torch.cat([output.patches(last, 'features').mean(dim=1) for output in outputs]),
                cls=torch.cat([output.extra(last, 'features')[:, 0] for output in outputs]))


def nmi_by_layer(model: ViTTeacher, images: Tensor) -> list[float]:
    """Normalised mutual information of the attention among patches, mean over heads and images, for each layer."""
    spec, values = model.spec, []
    for layer in range(spec.depth):
        taps = run(model, images, {'q', 'k'}, [layer]).taps
        attention = attention_from_qk(taps[layer, 'q'], taps[layer, 'k'], spec.num_heads, spec.num_extra_tokens)
        values.append(attention_nmi(attention).mean().item())
    return values


def relation_distance(student: ViTTeacher, teacher: ViTTeacher, images: Tensor, pairs: list[tuple[int, int]]) -> float:
    """KL of the teacher's qk relations to the student's, mean over layer pairs, full images."""
    total = 0.0
    for student_layer, teacher_layer in pairs:
        ours = run(student, images, {'q', 'k'}, [student_layer])
        theirs = run(teacher, images, {'q', 'k'}, [teacher_layer])
        tokens = [output.patches(layer, kind) for output, layer in ((ours, student_layer), (theirs, teacher_layer))
                  for kind in 'qk']
        total += relation_kl(*tokens, heads=student.spec.num_heads).item()
    return total / len(pairs)


@torch.no_grad()
def precision_error(model: ViTTeacher, images: Tensor, grid: tuple[int, int], layers: list[int],
                    dtype: str = 'bfloat16') -> dict[str, float]:
    """How far what a teacher teaches in ``dtype`` is from what it teaches in float32.

    Args:
        images, grid: see ``model.forward``.
        layers: those whose relations are compared.

    Returns:
        ``features``: mean over patches of |difference| / |float32| of the final features. ``relations``: KL of the
        float32 qk relations to the others, mean over ``layers``.
    """
    last, own, outputs = model.spec.depth - 1, model.dtype, []
    taps = merge_taps([{layer: frozenset('qk') for layer in layers}, {last: frozenset({'features'})}])
    for model.dtype in ('float32', dtype):
        outputs.append(model(images.float(), grid, taps))
    model.dtype = own
    exact, found = (output.patches(last, 'features').float() for output in outputs)
    kl = [relation_kl(*(output.patches(layer, kind).float() for output in reversed(outputs) for kind in 'qk'),
                      heads=model.spec.num_heads).item() for layer in layers]
    return dict(features=((found - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item(),
                relations=sum(kl) / len(kl))
