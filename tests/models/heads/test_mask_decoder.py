import re

import pytest
import torch
from torch.testing import assert_close

from mmhdistill.functional import sincos_positions
from mmhdistill.models import MaskDecoder
from tests.helpers import randomise

from ..conftest import random, random_keep_ids

GRID = (3, 5)
KEPT = random_keep_ids(2, 15, 6)


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    decoder = MaskDecoder(12, 20, **{**dict(embed_dims=16, depth=2, num_heads=4), **kwargs})
    decoder.init_weights()
    return randomise(decoder, seed).eval()


def tokens(extra=1, kept=6):
    return random(2, extra, 12, seed=1), random(2, kept, 12, seed=2)


def dropped_of(keep_ids, patches=15):
    return torch.tensor([[i for i in range(patches) if i not in row] for row in keep_ids.tolist()])


def at(x, ids):
    return torch.stack([row[index] for row, index in zip(x, ids)])


def test_forward__by_hand():
    """Place by place: the kept token or the mask token, its position, then the blocks."""
    decoder, (extra, patches) = build(), tokens()
    positions = sincos_positions(GRID, 16)[0]
    full = torch.empty(2, 15, 16)
    for image in range(2):
        for place in range(15):
            kept = KEPT[image].tolist()
            token = decoder.embed(patches[image, kept.index(place)]) if place in kept else decoder.mask_token[0, 0]
            full[image, place] = token + positions[place]
    x = torch.cat([decoder.embed(extra), full], dim=1)
    for layer in decoder.layers:
        x = layer(x)
    expected = decoder.predict(decoder.norm(x))[:, 1:]
    found = decoder(extra, patches, KEPT, GRID)
    assert found.shape == (2, 15, 20)
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('grid, kept, extra', [((1, 1), 1, 0), ((2, 8), 15, 1), ((4, 4), 1, 5), ((7, 3), 10, 2)])
def test_forward__any_grid_and_number_of_tokens(grid, kept, extra):
    decoder, num_patches = build(), grid[0] * grid[1]
    keep_ids = random_keep_ids(2, num_patches, kept)
    found = decoder(*tokens(extra, kept), keep_ids, grid)
    assert found.shape == (2, num_patches, 20)
    # Two places of one image are never alike: their positions differ.
    assert torch.pdist(found[0]).min() > 1e-3 if num_patches > 1 else found.std() > 0


def test_forward__order_of_the_kept_tokens_does_not_matter():
    decoder, (extra, patches) = build().double(), (x.double() for x in tokens())
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    expected = decoder(extra, patches, KEPT, GRID)
    found = decoder(extra, at(patches, order), at(KEPT, order), GRID)
    assert_close(found, expected, rtol=0, atol=1e-12)
    # It does with the ids left as they are.
    assert (decoder(extra, at(patches, order), KEPT, GRID) - expected).abs().max() > 1e-2


def test_forward__a_dropped_patch_is_predicted_from_the_kept_ones_and_positions():
    decoder, (extra, patches) = build(), tokens()
    dropped, before = dropped_of(KEPT), decoder(extra, patches, KEPT, GRID)
    for change in ('patches', 'extra', 'places'):
        new_patches, new_extra, ids = patches.clone(), extra.clone(), KEPT
        if change == 'patches':
            new_patches[0, 3] += 1.0
        elif change == 'extra':
            new_extra[0] += 1.0
        else:
            # The same tokens, one of them at a place that was dropped.
            ids = KEPT.clone()
            ids[0, 2] = dropped[0, 4]
        moved = (decoder(new_extra, new_patches, ids, GRID) - before).abs().amax(-1)
        assert at(moved, dropped)[0].min() > 1e-4
        # Images do not see each other.
        assert moved[1].max() == 0


def test_forward__dropped_patches_differ_by_their_position_alone(monkeypatch):
    decoder, (extra, patches) = build(), tokens()
    predicted = at(decoder(extra, patches, KEPT, GRID), dropped_of(KEPT))
    assert torch.pdist(predicted[0]).min() > 1e-3
    monkeypatch.setattr(decoder, '_position', lambda grid, like: torch.zeros_like(like))
    predicted = at(decoder(extra, patches, KEPT, GRID), dropped_of(KEPT))
    assert_close(predicted, predicted[:, :1].expand_as(predicted), rtol=0, atol=1e-6)


def test_forward__positions_are_kept_apart_by_grid_and_precision():
    decoder, (extra, patches) = build(), tokens()
    first = [decoder(extra, patches, KEPT, grid) for grid in (GRID, (5, 3))]
    again = [decoder(extra, patches, KEPT, grid) for grid in (GRID, (5, 3))]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert (first[0] - first[1]).abs().max() > 1e-2
    double = decoder.double()(extra.double(), patches.double(), KEPT, GRID)
    assert double.dtype == torch.float64
    assert_close(double.float(), first[0], rtol=0, atol=1e-5)
    half = decoder.bfloat16()(extra.bfloat16(), patches.bfloat16(), KEPT, GRID)
    assert_close(half.float(), first[0], rtol=0, atol=0.05 * first[0].abs().max().item())


def test_forward__gradient_reaches_every_parameter():
    decoder, (extra, patches) = build(), tokens()
    extra.requires_grad_(), patches.requires_grad_()
    at(decoder(extra, patches, KEPT, GRID), dropped_of(KEPT)).square().sum().backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or grad.abs().max() == 0] == []
    assert extra.grad.abs().amax(-1).min() > 0 and patches.grad.abs().amax(-1).min() > 0


def test_init_weights__mask_token_is_no_constant():
    decoder = MaskDecoder(12, 20)
    assert decoder.mask_token.abs().max() == 0
    torch.manual_seed(0)
    decoder.init_weights()
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    # Xavier: uniform within sqrt(6 / (in + out)).
    weight = decoder.predict.weight
    assert weight.shape == (20, 512)
    assert weight.std().item() == pytest.approx((6 / 532 / 3)**0.5, rel=0.02)
    assert (len(decoder.layers), decoder.layers[0].attn.num_heads) == (1, 8)


@pytest.mark.parametrize('settings, message', [
    (dict(depth=0), 'the decoder needs a depth of at least 1, got 0: without a block no mask token sees the image.'),
    (dict(depth=-2), 'the decoder needs a depth of at least 1, got -2: without a block no mask token sees the image.'),
    (dict(embed_dims=18, num_heads=3),
     'embed_dims=18 of the decoder must be a multiple of 4 (sin-cos positions) and of num_heads=3.'),
    (dict(embed_dims=16, num_heads=3),
     'embed_dims=16 of the decoder must be a multiple of 4 (sin-cos positions) and of num_heads=3.')])
def test_init__refused(settings, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        MaskDecoder(12, 20, **settings)
