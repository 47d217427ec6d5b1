"""A step of fake tensors keeps what a step of real ones keeps."""
import pytest
import torch
from mmengine.registry import DefaultScope

from mmhdistill.analysis.rehearsal import Rehearsal, build_on_meta
from tests.helpers import build_distiller, random_images

from .conftest import DISTILLERS, load, tiny_config


def kept_bytes(model, images, half):
    """Bytes that autograd really keeps of a step of a model on a CPU, parameters left out, and of teachers' outputs."""
    kept, known = {}, {x.untyped_storage().data_ptr() for x in [images, *model.parameters()]}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast(
            'cpu', dtype=torch.bfloat16, enabled=half):
        student, teachers = model.encode(images)
        losses = [loss(student, teachers[name]) for name, loss in model.losses.items()]
    assert all(loss.requires_grad for loss in losses)
    read = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for output in teachers.values() for x in output.taps.values()}
    return sum(storage.nbytes() for storage in kept.values()), sum(read.values())


@pytest.mark.parametrize('half', [False, True], ids=['float32', 'autocast'])
@pytest.mark.parametrize('name', DISTILLERS)
def test_rehearsal__keeps_what_a_step_keeps(name, half):
    batch, settings = 5, DISTILLERS[name]
    model = build_distiller(**settings).train()
    saved, read = kept_bytes(model, random_images(batch), half)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        step = Rehearsal(build_on_meta(tiny_config(**settings)), (32, 32), half).step()
    assert batch * (step.student + step.losses) + step.fixed == pytest.approx(saved, rel=0.01)
    assert batch * step.teachers == read
    # Under autocast, weights in 16 bits.
    matrices = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim > 1)
    assert step.fixed == pytest.approx(2 * matrices * half, rel=0.1, abs=512)


def test_build_on_meta__takes_no_memory():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = build_on_meta(
            load('configs/hdistill/vit-l_clip-mae_300e.py', model__teachers__mae__checkpoint=None))
    large = [distiller.backbone, *distiller.teachers.values()]
    assert {p.device.type for model in large for p in model.parameters()} == {'meta'}
