import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmhdistill.functional import attention_from_qk, attention_nmi


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('extra', [0, 1, 3])
def test_attention_from_qk__rows_sum_to_one(extra):
    attention = attention_from_qk(random(2, extra + 6, 8, seed=1), random(2, extra + 6, 8, seed=2), 4, extra)
    assert attention.shape == (2, 4, 6, 6)
    assert_close(attention.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64), rtol=0.0, atol=1e-14)
    assert attention.min() > 0


def test_attention_from_qk__extra_tokens_are_dropped_and_rows_renormalised():
    extra, heads, q, k = 2, 2, random(2, 7, 8, seed=1).double(), random(2, 7, 8, seed=2).double()
    got = attention_from_qk(q.float(), k.float(), heads, extra)
    for image in range(2):
        for head in range(heads):
            channels = slice(head * 4, head * 4 + 4)
            weights = np.exp(q[image, :, channels].numpy() @ k[image, :, channels].numpy().T / math.sqrt(4))
            patches = weights[extra:, extra:]
            want = torch.from_numpy(patches / patches.sum(axis=1, keepdims=True))
            assert_close(got[image, head], want, rtol=1e-12, atol=0.0)


def test_attention_nmi__identity_is_one():
    assert attention_nmi(torch.eye(16).expand(2, 1, 16, 16)).item() == pytest.approx(1.0, abs=1e-3)


def test_attention_nmi__query_independent_attention_is_zero():
    row = random(2, 3, 1, 16).softmax(-1)
    assert attention_nmi(row.expand(-1, -1, 16, -1)).abs().max() < 1e-6


def test_attention_nmi__one_key_sink_is_zero():
    # The entropy of its keys is so small that float32 rounding alone shows as 4e-6.
    scores = torch.zeros(1, 1, 196, 196)
    scores[..., 0] = 20.0
    assert attention_nmi(scores.softmax(-1)).abs().item() < 1e-10


def test_attention_nmi__per_head():
    heads = torch.stack([torch.eye(8), torch.full((8, 8), 1 / 8), torch.eye(8).roll(3, dims=0)]).unsqueeze(0)
    assert_close(attention_nmi(heads), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), rtol=0.0, atol=1e-5)


def test_attention_nmi__equals_joint_distribution():
    attention = (2 * random(3, 2, 10, 10)).double().softmax(-1)
    want = np.zeros(2)
    for head in range(2):
        for image in range(3):
            a = attention[image, head].numpy() + 1e-8
            joint = a / a.sum(axis=1, keepdims=True) / 10
            p_query, p_key = joint.sum(axis=1), joint.sum(axis=0)
            information = (joint * np.log(joint / np.outer(p_query, p_key))).sum()
            entropies = [-(p * np.log(p)).sum() for p in (p_query, p_key)]
            want[head] += information / np.sqrt(entropies[0] * entropies[1]) / 3
    assert attention_nmi(attention).tolist() == pytest.approx(want.tolist(), rel=1e-10)
    assert want.min() > 0.05 and want.max() < 0.95
