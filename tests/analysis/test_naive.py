"""The naive way computes what the distiller does."""
import pytest
import torch

from mmhdistill.analysis.naive import naive_losses, naive_relation_kl
from mmhdistill.functional import relation_kl
from tests.helpers import build_distiller, random_images


@pytest.mark.parametrize('relation', [dict(), dict(kinds=['qk', 'vv'], temperature=0.5, loss_weight=0.3)])
def test_naive_losses__values_and_gradients_of_the_distiller(relation):
    losses = dict(feature=dict(type='mmhdistill.FeatureLoss', teacher='clip'),
                  relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae', **relation))
    model = build_distiller(masker=None, losses=losses)
    images = random_images()
    found, gradients = [], []
    for values in (model.loss(images), naive_losses(model, images)):
        model.zero_grad()
        sum(values.values()).backward()
        found.append({name: value.detach() for name, value in values.items()})
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_naive_relation_kl__is_relation_kl():
    tokens = torch.randn(4, 2, 5, 12)
    torch.testing.assert_close(naive_relation_kl(*tokens, heads=3), relation_kl(*tokens, heads=3))


def test_naive_losses__of_another_loss():
    losses = dict(feature=dict(type='mmhdistill.FeatureLoss', teacher='clip'),
                  relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae', distance='smooth_l1'))
    with pytest.raises(ValueError, match='not for relation: TokenRelationLoss'):
        naive_losses(build_distiller(losses=losses), random_images())
