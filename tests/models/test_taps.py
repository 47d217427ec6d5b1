import re

import pytest
import torch
from torch.testing import assert_close

from mmhdistill.models.taps import ViTOutput, ViTSpec, merge_taps

from .conftest import bilinear_matrix, random

DROPPED = ("tokens were dropped, so a grid of 3x5 patches cannot be resampled to one of 4x4: leave the teacher's "
           'image_size out, or train without a masker (masker=None, and no RedundantTokenMasker hook).')
SPEC = ViTSpec(embed_dims=16, depth=4, num_heads=2, patch_size=8)


def output(keep_ids=None, extra=2, tokens=6):
    taps = {(1, 'q'): random(2, extra + tokens, 3)}
    return ViTOutput(taps, extra, (2, 3), {1: keep_ids})


def test_vit_spec_layer__counts_from_either_end():
    assert [SPEC.layer(i, 'student') for i in (0, 3, -1, -4)] == [0, 3, 3, 0]


@pytest.mark.parametrize('index', [4, -5])
def test_vit_spec_layer__out_of_range(index):
    message = f'layer {index} is out of range for the teacher, which has 4 layers: .* choose 0 to 3'
    with pytest.raises(ValueError, match=message):
        SPEC.layer(index, 'teacher')


def test_vit_output__extra_tokens_come_first():
    out = output()
    assert torch.equal(out.extra(1, 'q'), out.taps[1, 'q'][:, :2])
    assert torch.equal(out.patches(1, 'q'), out.taps[1, 'q'][:, 2:])


def test_vit_output_patches__full_image_read_at_kept_patches():
    out, ids = output(), torch.tensor([[0, 5], [1, 4]])
    full = out.taps[1, 'q']
    assert torch.equal(out.patches(1, 'q', ids), torch.stack([full[0, [2, 7]], full[1, [3, 6]]]))


def test_vit_output_patches__masked_at_its_own_patches():
    ids = torch.tensor([[0, 5, 7], [1, 4, 6]])
    out = output(ids, tokens=3)
    for asked in (None, ids, ids.clone()):
        assert torch.equal(out.patches(1, 'q', asked), out.taps[1, 'q'][:, 2:])


@pytest.mark.parametrize('asked', [[[0, 5, 7], [1, 4, 8]], [[0, 5], [1, 4]]])
def test_vit_output_patches__masked_at_other_patches(asked):
    out = output(torch.tensor([[0, 5, 7], [1, 4, 6]]), tokens=3)
    with pytest.raises(ValueError, match='layer 1 saw other tokens than the ones asked for'):
        out.patches(1, 'q', torch.tensor(asked))


def test_merge_taps__union_by_layer():
    parts = [{0: frozenset('qk')}, {0: frozenset('kv'), 2: frozenset({'hidden'})}, {}, {2: frozenset({'features'})}]
    assert merge_taps(parts) == {0: frozenset('qkv'), 2: frozenset({'hidden', 'features'})}
    assert merge_taps([]) == {}


def grid_output(grid, extra=1, channels=6, keep_ids=None):
    tokens = extra + (grid[0] * grid[1] if keep_ids is None else keep_ids.shape[1])
    taps = {(1, kind): random(2, tokens, channels, seed=seed, dtype=torch.float64) for seed, kind in enumerate('qk')}
    return ViTOutput(taps, extra, grid, {1: keep_ids})


@pytest.mark.parametrize('own, other', [((14, 14), (16, 16)), ((16, 16), (14, 14)), ((3, 5), (4, 2))])
def test_vit_output_patches__relations_of_resampled_tokens_are_the_resampled_relations(own, other):
    # A teacher that sees 224 px with patches of 14 beside a student with patches of 16.
    out, weights = grid_output(own), bilinear_matrix(own, other)
    q, k = (out.patches(1, kind, grid=other) for kind in 'qk')
    relation = out.patches(1, 'q') @ out.patches(1, 'k').mT
    assert q.shape == (2, other[0] * other[1], 6)
    assert_close(q @ k.mT, weights @ relation @ weights.T, rtol=0, atol=1e-10)


def test_vit_output_patches__resampled_constants_and_ramps_stay_what_they_are():
    out = grid_output((4, 6), channels=2)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing='ij')
    out.taps[1, 'q'][:, 1:, 0] = 3.0
    out.taps[1, 'q'][:, 1:, 1] = (10 * rows + columns).flatten()
    found = out.patches(1, 'q', grid=(8, 12))
    assert_close(found[..., 0], torch.full((2, 96), 3.0, dtype=torch.float64))
    inner = found[..., 1].reshape(2, 8, 12)[:, 1:-1, 1:-1]
    assert_close(inner.diff(dim=1), torch.full_like(inner[:, 1:], 5.0))
    assert_close(inner.diff(dim=2), torch.full_like(inner[:, :, 1:], 0.5))


def test_vit_output_patches__its_own_grid_is_read_as_it_is():
    out, ids = grid_output((3, 5)), torch.tensor([[0, 7], [3, 14]])
    assert torch.equal(out.patches(1, 'q', grid=(3, 5)), out.taps[1, 'q'][:, 1:])
    assert torch.equal(out.patches(1, 'q', ids, grid=(3, 5)), out.patches(1, 'q', ids))


def test_vit_output_patches__dropped_tokens_cannot_be_resampled():
    out = grid_output((3, 5), keep_ids=torch.tensor([[0, 7], [3, 14]]))
    with pytest.raises(ValueError, match=f'^{re.escape(DROPPED)}$'):
        out.patches(1, 'q', grid=(4, 4))


def test_vit_output_patches__chosen_patches_of_another_grid_are_refused():
    # Their indices would be in the other grid.
    out, ids = grid_output((3, 5)), torch.tensor([[0, 7], [3, 14]])
    with pytest.raises(ValueError, match=f'^{re.escape(DROPPED)}$'):
        out.patches(1, 'q', ids, grid=(4, 4))
    assert out.patches(1, 'q', grid=(4, 4)).shape == (2, 16, 6)


@pytest.mark.parametrize('class_token, extra, has', [(True, 1, True), (True, 5, True), (True, 0, False),
                                                     (False, 4, False), (False, 0, False)])
def test_vit_spec_has_class_token__registers_are_none(class_token, extra, has):
    spec = ViTSpec(16, 4, 2, 8, num_extra_tokens=extra, class_token=class_token)
    assert spec.has_class_token is has


def test_vit_output_patches__resampling_hands_gradients_to_every_patch():
    out = grid_output((4, 4))
    tokens = out.taps[1, 'q'].requires_grad_()
    out.patches(1, 'q', grid=(7, 7)).sum().backward()
    # The columns of the weights, which sum to what a patch gives to all others.
    assert_close(tokens.grad[:, 1:, 0], bilinear_matrix((4, 4), (7, 7)).sum(0).expand(2, -1))
    assert tokens.grad[:, :1].abs().max() == 0
