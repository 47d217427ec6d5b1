import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmhdistill.functional import mean_similarity, negative_cls_attention


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_similarity__equals_cosine_matrix_without_diagonal():
    tokens = random(2, 9, 16) + 0.5
    cosine = F.cosine_similarity(tokens[:, :, None].double(), tokens[:, None].double(), dim=-1)
    off_diagonal = cosine * (1 - torch.eye(9, dtype=torch.float64))
    scores = mean_similarity(tokens)
    assert_close(scores.double(), off_diagonal.sum(-1) / 8, rtol=0.0, atol=1e-6)
    assert scores.std() > 0.01


def test_mean_similarity__length_of_a_token_does_not_count():
    tokens = random(1, 6, 8)
    stretched = tokens * torch.tensor([0.1, 1.0, 10.0, 2.0, 0.5, 100.0]).view(1, -1, 1)
    assert_close(mean_similarity(stretched), mean_similarity(tokens), rtol=0.0, atol=1e-6)


def test_mean_similarity__planted_duplicates_score_highest():
    tokens = random(3, 12, 32)
    duplicates = [[0, 5, 7, 11], [1, 2, 3, 4], [8, 9, 10, 11]]
    for image, ids in enumerate(duplicates):
        tokens[image, ids] = tokens[image, ids[0]].clone()
    top = mean_similarity(tokens).topk(4, dim=1).indices.sort(dim=1).values
    assert top.tolist() == duplicates


def test_mean_similarity__orthogonal_and_duplicate_tokens():
    # Tokens 0 and 1 are equal, 2 to 4 orthogonal to all others: one similar token among four others.
    tokens = torch.eye(5)[[0, 0, 2, 3, 4]].unsqueeze(0)
    assert_close(mean_similarity(tokens), torch.tensor([[0.25, 0.25, 0.0, 0.0, 0.0]]), rtol=0.0, atol=1e-7)


def test_mean_similarity__single_token():
    assert_close(mean_similarity(random(2, 1, 8)), torch.zeros(2, 1), rtol=0.0, atol=1e-6)


def test_mean_similarity__half_precision_is_promoted():
    tokens = (random(1, 6, 8) * 300).half()
    assert_close(mean_similarity(tokens), mean_similarity(tokens.float()), rtol=0.0, atol=0.0)


def test_negative_cls_attention__equals_explicit_softmax():
    heads, extra, q, k = 2, 3, random(2, 3 + 5, 8, seed=1), random(2, 3 + 5, 8, seed=2)
    want = torch.zeros(2, 5)
    for image in range(2):
        for head in range(heads):
            channels = slice(head * 4, head * 4 + 4)
            query = q[image, 0, channels] / math.sqrt(4)
            weights = [math.exp(torch.dot(query, key[channels]).item()) for key in k[image]]
            for patch in range(5):
                want[image, patch] -= weights[extra + patch] / sum(weights) / heads
    got = negative_cls_attention(q, k, heads, extra)
    assert_close(got, want, rtol=1e-5, atol=1e-7)
    # Attention to the extra tokens is left out, not redistributed.
    assert (got.sum(dim=1) > -1).all()
    assert_close(negative_cls_attention(q, k, heads, 1)[:, 2:], want, rtol=1e-5, atol=1e-7)


def test_negative_cls_attention__autocast_keeps_float32():
    q, k = random(2, 50, 16, seed=1), random(2, 50, 16, seed=2)
    with torch.autocast('cpu', torch.bfloat16):
        got = negative_cls_attention(q, k, 2)
    assert_close(got, negative_cls_attention(q, k, 2), rtol=0.0, atol=1e-7)
