import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmhdistill.models import CLSAttentionScorer, RandomScorer, SimilarityScorer
from mmhdistill.models.taps import ViTSpec

from ..conftest import random

SPEC = ViTSpec(embed_dims=8, depth=4, num_heads=2, patch_size=8, num_extra_tokens=3)
IDS = torch.arange(5).expand(2, -1)


def test_scorers__read_what_they_need():
    kinds = [scorer.kinds for scorer in (SimilarityScorer, CLSAttentionScorer, RandomScorer)]
    assert kinds == [{'hidden'}, {'q', 'k'}, set()]


def test_similarity_scorer__compares_patches_only():
    hidden = random(2, 8, 8)
    patches = hidden[:, 3:]
    cosine = F.cosine_similarity(patches[:, :, None], patches[:, None], dim=-1)
    want = (cosine.sum(-1) - 1) / 4
    assert_close(SimilarityScorer()({'hidden': hidden}, IDS, SPEC), want, rtol=0.0, atol=1e-6)


def test_cls_attention_scorer__is_minus_the_attention_of_the_class_token():
    q, k = random(2, 8, 8, seed=1), random(2, 8, 8, seed=2)
    heads = [(q[:, :1, c] @ k[..., c].transpose(1, 2) / 2).softmax(-1) for c in (slice(0, 4), slice(4, 8))]
    want = -(heads[0] + heads[1])[:, 0, 3:] / 2
    assert_close(CLSAttentionScorer()({'q': q, 'k': k}, IDS, SPEC), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('tokens', [dict(num_extra_tokens=0), dict(num_extra_tokens=4, class_token=False)])
def test_cls_attention_scorer__model_without_a_class_token(tokens):
    spec = ViTSpec(embed_dims=8, depth=4, num_heads=2, patch_size=8, **tokens)
    with pytest.raises(ValueError, match='CLSAttentionScorer needs a model with a class token.* use SimilarityScorer'):
        CLSAttentionScorer().check(spec)


def test_random_scorer__follows_the_torch_generator():
    torch.manual_seed(3)
    want = torch.rand(2, 5)
    torch.manual_seed(3)
    scorer = RandomScorer()
    assert torch.equal(scorer({}, IDS, SPEC), want)
    assert not torch.equal(scorer({}, IDS, SPEC), want)
