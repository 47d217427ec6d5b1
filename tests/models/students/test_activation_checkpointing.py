"""``with_cp`` keeps less and changes nothing."""
import pytest
import torch

from tests.helpers import build_distiller, random_images, tiny_student

SCORER = dict(type='mmhdistill.SimilarityScorer')
MASKERS = dict(
    none=None,
    input=dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.8, teacher='mae', scorer=SCORER),
    encoder=dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder', keep_rate=0.6, scorer=SCORER))


def train(with_cp, masker):
    """Losses, gradients of the student, and elements that are saved for backward."""
    distiller = build_distiller(backbone=tiny_student(with_cp=with_cp, drop_path_rate=0.5), masker=masker)
    distiller.train()
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = distiller.loss(random_images(4))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in distiller.backbone.named_parameters() if p.requires_grad}
    weights = {p.untyped_storage().data_ptr() for p in distiller.parameters()}
    return losses, gradients, sum(size for pointer, size in saved.items() if pointer not in weights)


@pytest.mark.parametrize('masker', MASKERS)
def test_with_cp__same_losses_and_gradients_from_less(masker):
    (losses, gradients, kept), (found, others, less) = (train(with_cp, MASKERS[masker]) for with_cp in (False, True))
    assert {name: loss.item() for name, loss in found.items()} == {name: loss.item() for name, loss in losses.items()}
    assert gradients.keys() == others.keys() and len(gradients) > 30
    for name, gradient in gradients.items():
        # Drop path drew the same again.
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7)
    assert less < 0.6 * kept


def test_with_cp__nothing_is_computed_again_without_gradients(monkeypatch):
    from mmhdistill.models.students import maskable_vision_transformer as module
    distiller = build_distiller(backbone=tiny_student(with_cp=True))
    monkeypatch.setattr(module, 'checkpoint', lambda *args, **kwargs: pytest.fail('checkpointed'))
    assert len(distiller.predict(random_images(2))) == 2
    with pytest.raises(pytest.fail.Exception, match='checkpointed'):
        distiller.loss(random_images(2))
