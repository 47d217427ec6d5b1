import pytest
import torch

from mmhdistill.models.taps import ViTOutput, ViTSpec, merge_taps

from .conftest import random

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
