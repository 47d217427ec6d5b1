import math

import pytest
import torch
import torch.nn.functional as F

from mmhdistill.models import ProgressiveTokenMasker
from mmhdistill.models.taps import ViTSpec, merge_taps
from mmhdistill.models.vit import embed, encode
from tests.helpers import log_messages

from ..conftest import random, random_output, tiny_vit, without_blocks

SPEC = ViTSpec(embed_dims=16, depth=6, num_heads=2, patch_size=8)
REGISTERS = ViTSpec(embed_dims=16, depth=6, num_heads=2, patch_size=8, num_extra_tokens=5)
SIMILARITY, CLS, RANDOM = (dict(type=f'mmhdistill.{name}Scorer') for name in ('Similarity', 'CLSAttention', 'Random'))
SCORERS = [SIMILARITY, CLS, RANDOM]
HIDDEN = frozenset({'hidden'})


def bound(spec=SPEC, place='input', scorer=SIMILARITY, **kwargs):
    if place == 'input' and scorer is not RANDOM:
        kwargs.setdefault('teacher', 'mim')
    masker = ProgressiveTokenMasker(place, scorer=scorer, **kwargs)
    masker.bind(spec)
    return masker


def redundancy(taps, layer, image, scorer, spec, kept):
    """Score of each patch number of ``kept``, with the definition written out for one image."""
    rows = [spec.num_extra_tokens + patch for patch in kept]
    if scorer is SIMILARITY:
        x = taps[layer, 'hidden'][image, rows].double()
        cosine = F.cosine_similarity(x[:, None], x[None], dim=-1)
        return [(row.sum().item() - 1) / (len(kept) - 1) for row in cosine]
    rows = list(range(spec.num_extra_tokens)) + rows
    q, k = (taps[layer, kind][image, rows].double() for kind in 'qk')
    width = spec.embed_dims // spec.num_heads
    total = torch.zeros(len(rows), dtype=torch.float64)
    for head in range(spec.num_heads):
        channels = slice(head * width, (head + 1) * width)
        total += (k[:, channels] @ q[0, channels] / math.sqrt(width)).softmax(0)
    return (-total / spec.num_heads)[spec.num_extra_tokens:].tolist()


def drop(kept, scores, count):
    order = sorted(range(len(kept)), key=lambda i: scores[i])
    return sorted(kept[i] for i in order[:count])


def assert_nested(stages):
    """Each of the (B, K) index sets holds distinct patches in ascending order, all from the set before."""
    for before, after in zip(stages, stages[1:]):
        for outer, inner in zip(before.tolist(), after.tolist()):
            assert set(inner) <= set(outer)
            assert inner == sorted(set(inner))


@pytest.mark.parametrize('place, stages, layers', [('input', 3, [0, 2, 4]), ('encoder', 3, [1, 3]),
                                                   ('input', 2, [0, 3]), ('encoder', 4, [0, 2, 3]),
                                                   ('input', 1, [0]), ('encoder', 1, [])])
def test_taps__scoring_layers(place, stages, layers):
    assert bound(place=place, num_stages=stages).taps == dict.fromkeys(layers, HIDDEN)
    assert bound(place=place, num_stages=stages, scorer=CLS).taps == dict.fromkeys(layers, frozenset('qk'))
    assert bound(place=place, num_stages=stages, scorer=RANDOM).taps == {}


def test_taps__twelve_layers():
    twelve = ViTSpec(embed_dims=16, depth=12, num_heads=2, patch_size=8)
    assert sorted(bound(twelve).taps) == [0, 4, 8]
    assert sorted(bound(twelve, place='encoder').taps) == [3, 7]


@pytest.mark.parametrize('place, kwargs, counts', [
    ('input', {}, [137, 96, 67]),
    ('encoder', {}, [196, 137, 96]),
    ('input', dict(keep_rate=0.9), [176, 159, 143]),
    ('input', dict(round_to=8), [144, 96, 72]),
    ('encoder', dict(round_to=8), [196, 144, 96]),
    ('input', dict(num_stages=1), [137]),
    ('encoder', dict(num_stages=2), [196, 137]),
])
def test_counts__of_196_patches(place, kwargs, counts):
    assert bound(place=place, **kwargs).counts(196) == counts


def test_counts__follow_the_present_keep_rate():
    masker = bound(keep_rate=0.7)
    masker.keep_rate = 0.5
    assert masker.counts(196) == [98, 49, 25]


@pytest.mark.parametrize('place, kwargs, kept', [
    ('input', {}, [67] * 6),
    ('encoder', {}, [196, 196, 137, 137, 96, 96]),
    ('encoder', dict(num_stages=4), [196, 137, 137, 96, 67, 67]),
    ('encoder', dict(num_stages=2, round_to=8), [196] * 3 + [144] * 3),
    ('encoder', dict(num_stages=1), [196] * 6),
    ('input', dict(keep_rate=1.0), [196] * 6),
])
def test_kept_by_layer__of_196_patches(place, kwargs, kept):
    assert bound(place=place, **kwargs).kept_by_layer(196, 6) == kept


@pytest.mark.parametrize('place', ['input', 'encoder'])
@pytest.mark.parametrize('stages', [1, 2, 3, 5])
def test_kept_by_layer__is_what_each_block_sees(place, stages):
    vit = tiny_vit(depth=6)
    masker = bound(vit.spec, place, RANDOM, num_stages=stages)
    seen = []
    for block in vit.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1] - 1))
    vit.encode(random(2, 3, 32, 32), {5: HIDDEN}, masker.reducer(2, 16, torch.device('cpu'), None))
    assert seen == masker.kept_by_layer(16, 6)


def test_kept_by_layer__follows_the_present_keep_rate():
    masker = bound(place='encoder')
    masker.keep_rate = 0.5
    assert masker.kept_by_layer(16, 6) == [16, 16, 8, 8, 4, 4]


@pytest.mark.parametrize('spec', [SPEC, REGISTERS])
@pytest.mark.parametrize('scorer', [SIMILARITY, CLS])
@pytest.mark.parametrize('kwargs, counts', [({}, [11, 8, 5]), (dict(keep_rate=0.8, round_to=4), [16, 12, 8])])
def test_input__drops_what_the_definition_says(scorer, spec, kwargs, counts):
    masker = bound(spec, scorer=scorer, **kwargs)
    reference = random_output(spec, masker.taps, batch=3)
    reducer = masker.reducer(3, 16, torch.device('cpu'), reference)
    keep_ids = reducer(0, {})
    assert masker.last_counts == counts
    assert reducer(1, {}) is None and reducer(4, {}) is None
    for image in range(3):
        kept = list(range(16))
        for layer, count in zip((0, 2, 4), counts):
            kept = drop(kept, redundancy(reference.taps, layer, image, scorer, spec, kept), count)
        assert keep_ids[image].tolist() == kept


@pytest.mark.parametrize('scorer', SCORERS)
def test_select__kept_sets_are_nested(scorer):
    masker, counts = bound(scorer=scorer), [11, 8, 5]
    reference = random_output(SPEC, masker.taps or {0: HIDDEN}, batch=3)
    stages = [torch.arange(16).expand(3, -1)]
    for stop in (1, 2, 3):
        torch.manual_seed(0)
        stages.append(masker.select(stages[0], counts[:stop], reference))
    assert [x.shape[1] for x in stages] == [16, *counts]
    assert_nested(stages)
    assert not torch.equal(stages[3][0], stages[3][1])


@pytest.mark.parametrize('place', ['input', 'encoder'])
def test_random__same_seed_same_mask(place):
    masker, masks = bound(place=place, scorer=RANDOM), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        reducer = masker.reducer(4, 16, torch.device('cpu'), None)
        masks.append(torch.cat([x for x in (reducer(index, {}) for index in range(6)) if x is not None], dim=1))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert masks[0].shape[1] == (5 if place == 'input' else 11 + 8)


def test_random__every_patch_is_kept_equally_often():
    torch.manual_seed(0)
    keep_ids = bound(scorer=RANDOM).reducer(4000, 16, torch.device('cpu'), None)(0, {})
    share = torch.bincount(keep_ids.flatten(), minlength=16) / 4000
    # 5 of 16 are kept; six standard deviations.
    assert (share - 5 / 16).abs().max() < 6 * math.sqrt(5 / 16 * 11 / 16 / 4000)


def test_input__planted_duplicates_go_first():
    masker = bound()
    reference = random_output(SPEC, masker.taps)
    duplicates = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15]]
    for hidden in reference.taps.values():
        hidden[:, 1:] = torch.eye(16)
        for image, ids in enumerate(duplicates):
            hidden[image, [1 + i for i in ids]] = torch.ones(16)
            hidden[image, [1 + i for i in range(16) if i not in ids]] *= -1
    keep_ids = masker.reducer(2, 16, torch.device('cpu'), reference)(0, {})
    # Five patches are left: the four that are alone, and one of the twelve alike.
    for kept, ids in zip(keep_ids.tolist(), duplicates):
        assert len(set(kept) & set(ids)) == 1
        assert set(range(16)) - set(ids) <= set(kept)


@pytest.mark.parametrize('place', ['input', 'encoder'])
def test_masker__repeated_patches_of_an_image_go_first(place):
    # Blocks add nothing and positions are zero, so that equal patches are equal tokens at every layer.
    vit = without_blocks(tiny_vit(depth=6))
    torch.nn.init.zeros_(vit.pos_embed)
    grid = random(2, 4, 4, 3, 8, 8)
    repeated = [[0, 2, 3, 5, 7, 8, 9, 10, 11, 13, 14], [1, 2, 4, 5, 6, 7, 8, 11, 12, 13, 15]]
    for image, ids in enumerate(repeated):
        for i in ids:
            grid[image, i // 4, i % 4] = grid[image, ids[0] // 4, ids[0] % 4].clone()
    images = grid.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)

    masker = bound(vit.spec, place)
    taps = merge_taps([masker.taps, {5: HIDDEN}])
    reference = encode(vit, images, masker.taps) if place == 'input' else None
    out = vit.encode(images, taps, masker.reducer(2, 16, torch.device('cpu'), reference))
    count = 5 if place == 'input' else 8
    assert out.keep_ids[5].shape == (2, count)
    for kept, ids in zip(out.keep_ids[5].tolist(), repeated):
        assert set(range(16)) - set(ids) <= set(kept)


@pytest.mark.parametrize('scorer', [SIMILARITY, CLS])
def test_encoder__drops_what_the_definition_says(scorer):
    vit, images = tiny_vit(depth=6), random(3, 3, 32, 32)
    masker = bound(vit.spec, 'encoder', scorer)
    seen = {}
    for index, block in enumerate(vit.layers):
        block.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0].shape[1]}))
        block.ffn.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0].shape[1]}))
    taps = merge_taps([masker.taps, {5: frozenset({'features'})}])
    out = vit.encode(images, taps, masker.reducer(3, 16, torch.device('cpu'), None))
    assert masker.last_counts == [16, 11, 8]
    assert seen == {0: 17, 1: 17, 2: 12, 3: 12, 4: 9, 5: 9}
    assert out.keep_ids[0] is None and out.keep_ids[1] is None
    assert out.taps[5, 'features'].shape[1] == 9
    assert_nested([torch.arange(16).expand(3, -1), *(out.keep_ids[layer] for layer in range(2, 6))])
    for image in range(3):
        first = drop(list(range(16)), redundancy(out.taps, 1, image, scorer, vit.spec, list(range(16))), 11)
        assert out.keep_ids[2][image].tolist() == out.keep_ids[3][image].tolist() == first
        # Layer 3 holds the eleven patches under new numbers.
        local = drop(list(range(11)), redundancy(out.taps, 3, image, scorer, vit.spec, list(range(11))), 8)
        assert out.keep_ids[4][image].tolist() == out.keep_ids[5][image].tolist() == [first[i] for i in local]


def test_encoder__counts_are_those_of_the_stages_that_were_reached():
    vit, images = tiny_vit(depth=6), random(3, 3, 32, 32)
    for deepest, counts in ((1, [16]), (3, [16, 11]), (5, [16, 11, 8])):
        masker = bound(vit.spec, 'encoder', SIMILARITY)
        taps = {layer: kinds for layer, kinds in masker.taps.items() if layer < deepest}
        vit.encode(images, merge_taps([taps, {deepest: HIDDEN}]), masker.reducer(3, 16, torch.device('cpu'), None))
        assert masker.last_counts == counts


def test_round_to__is_told_once():
    masker = bound(scorer=RANDOM, round_to=4)
    with log_messages() as messages:
        for _ in range(2):
            masker.reducer(2, 16, torch.device('cpu'), None)
    assert messages == ['round_to=4: [12, 8, 8] tokens are left after the stages instead of [11, 8, 5]']


@pytest.mark.parametrize('with_cls_token', [True, False])
@pytest.mark.parametrize('scorer', [SIMILARITY, RANDOM])
@pytest.mark.parametrize('place', ['input', 'encoder'])
def test_masker__kept_patches_are_the_recorded_ones(place, scorer, with_cls_token):
    # Blocks that add nothing leave each hidden state the embedding of its patch.
    vit, images = without_blocks(tiny_vit(depth=6, with_cls_token=with_cls_token)), random(2, 3, 32, 32)
    masker = bound(vit.spec, place, scorer)
    reference = encode(vit, images, masker.taps) if place == 'input' and masker.taps else None
    torch.manual_seed(0)
    out = vit.encode(images, dict.fromkeys(range(6), HIDDEN), masker.reducer(2, 16, torch.device('cpu'), reference))
    tokens, _ = embed(vit, images)
    extra = int(with_cls_token)
    counts = [5] * 6 if place == 'input' else [16, 16, 11, 11, 8, 8]
    for layer, count in enumerate(counts):
        hidden = out.taps[layer, 'hidden']
        assert hidden.shape[1] == extra + count
        assert torch.equal(hidden[:, :extra], tokens[:, :extra])
        ids = out.keep_ids[layer]
        ids = torch.arange(16).expand(2, -1) if ids is None else ids
        for image in range(2):
            assert torch.equal(hidden[image, extra:], tokens[image, extra + ids[image]])


@pytest.mark.parametrize('scorer', SCORERS)
@pytest.mark.parametrize('place', ['input', 'encoder'])
def test_reducer__keep_rate_one_drops_nothing(place, scorer):
    masker = bound(place=place, scorer=scorer, keep_rate=1.0)
    assert masker.reducer(2, 16, torch.device('cpu'), None) is None
    assert masker.last_counts == [16, 16, 16]


def test_init__unknown_place():
    with pytest.raises(ValueError, match="unknown place 'output': choose 'input' .* or 'encoder'"):
        ProgressiveTokenMasker('output')


@pytest.mark.parametrize('keep_rate', [0, -0.5, 1.1])
def test_init__keep_rate_out_of_range(keep_rate):
    with pytest.raises(ValueError, match=rf'keep rate must lie in \(0, 1\], got {keep_rate}'):
        ProgressiveTokenMasker('encoder', keep_rate=keep_rate)


def test_init__no_stage():
    with pytest.raises(ValueError, match='num_stages must be at least 1, got 0'):
        ProgressiveTokenMasker('encoder', num_stages=0)


def test_init__missing_teacher():
    with pytest.raises(ValueError, match="place='input' with SimilarityScorer needs the name of the teacher"):
        ProgressiveTokenMasker('input')


@pytest.mark.parametrize('place, scorer, name', [('encoder', SIMILARITY, 'SimilarityScorer'),
                                                 ('encoder', RANDOM, 'RandomScorer'),
                                                 ('input', RANDOM, 'RandomScorer')])
def test_init__needless_teacher(place, scorer, name):
    message = f"teacher='mim' is given, but with place='{place}' and {name} no teacher is read: leave it out"
    with pytest.raises(ValueError, match=message):
        ProgressiveTokenMasker(place, scorer=scorer, teacher='mim')


@pytest.mark.parametrize('place', ['input', 'encoder'])
def test_bind__cls_scorer_without_a_class_token(place):
    with pytest.raises(ValueError, match='CLSAttentionScorer needs a model with a class token'):
        bound(ViTSpec(embed_dims=16, depth=6, num_heads=2, patch_size=8, num_extra_tokens=0), place, CLS)


def test_bind__more_stages_than_layers():
    with pytest.raises(ValueError, match='7 stages need .* at least as many layers, but it has 6: .* at most 6'):
        bound(num_stages=7)
    assert sorted(bound(num_stages=6).taps) == [0, 1, 2, 3, 4, 5]
