from itertools import chain, combinations

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import VisionTransformer
from torch.testing import assert_close

from mmhdistill.models.vit import embed, encode, unused_parameters, vit_spec

from .conftest import random, random_keep_ids, tiny_vit, without_blocks

DEPTH = 4
EVERYTHING = {layer: frozenset({'hidden', 'q', 'k', 'v'}) for layer in range(DEPTH)}
FEATURES = {DEPTH - 1: frozenset({'features'})}
VARIANTS = [
    {}, dict(qkv_bias=False), dict(pre_norm=True), dict(layer_scale_init_value=0.1), dict(with_cls_token=False),
]
SUBSETS = [frozenset(s) for s in chain.from_iterable(combinations('qkv', n) for n in (1, 2, 3))]


def mmpretrain_raw(vit, images):
    """Output of the base class's own ``forward`` with out_type raw."""
    return VisionTransformer.forward(vit, images)[-1]


@pytest.mark.parametrize('kwargs', VARIANTS)
@pytest.mark.parametrize('taps', [FEATURES, EVERYTHING | {DEPTH - 1: frozenset({'q', 'features'})}])
def test_encode__equals_mmpretrain(taps, kwargs):
    vit, images = tiny_vit(**kwargs), random(2, 3, 32, 32)
    out = encode(vit, images, taps)
    want = mmpretrain_raw(vit, images)
    assert_close(out.taps[DEPTH - 1, 'features'], want, rtol=0.0, atol=1e-6)
    assert want.std() > 0.1
    assert out.grid == (4, 4)
    assert out.num_extra_tokens == int(kwargs.get('with_cls_token', True))
    assert out.keep_ids == dict.fromkeys(range(DEPTH))


@pytest.mark.parametrize('size, grid', [((48, 48), (6, 6)), ((32, 48), (4, 6)), ((16, 24), (2, 3))])
def test_encode__position_embedding_of_another_size(size, grid):
    vit, images = tiny_vit(), random(2, 3, *size)
    out = encode(vit, images, FEATURES)
    assert out.grid == grid
    assert_close(out.taps[DEPTH - 1, 'features'], mmpretrain_raw(vit, images), rtol=0.0, atol=1e-6)


def test_encode__dropout_and_drop_path_as_mmpretrain():
    kwargs = dict(drop_rate=0.2, drop_path_rate=0.3, layer_cfgs=dict(attn_drop_rate=0.2), layer_scale_init_value=0.1)
    vit, images = tiny_vit(**kwargs), random(4, 3, 32, 32)
    vit.train()
    torch.manual_seed(0)
    want = mmpretrain_raw(vit, images)
    for taps in (FEATURES, EVERYTHING | {DEPTH - 1: frozenset({'q', 'features'})}):
        torch.manual_seed(0)
        got = encode(vit, images, taps).taps[DEPTH - 1, 'features']
        assert_close(got, want, rtol=0.0, atol=1e-6)
    torch.manual_seed(1)
    assert (encode(vit, images, FEATURES).taps[DEPTH - 1, 'features'] - want).abs().max() > 0.1


@pytest.mark.parametrize('kwargs', VARIANTS)
def test_encode__taps_by_hand(kwargs):
    vit, images = tiny_vit(**kwargs), random(2, 3, 32, 32)
    out = encode(vit, images, EVERYTHING)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    x = patches @ vit.patch_embed.projection.weight.flatten(1).T
    if vit.patch_embed.projection.bias is not None:
        x = x + vit.patch_embed.projection.bias
    if vit.cls_token is not None:
        x = torch.cat([vit.cls_token.expand(2, 1, -1), x], dim=1)
    x = vit.pre_norm(x + vit.pos_embed)
    for layer, block in enumerate(vit.layers):
        normal = F.layer_norm(x, (16, ), block.ln1.weight, block.ln1.bias, block.ln1.eps)
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        for i, kind in enumerate('qkv'):
            rows = slice(16 * i, 16 * i + 16)
            want = normal @ weight[rows].T + (0.0 if bias is None else bias[rows])
            assert_close(out.taps[layer, kind], want, rtol=1e-5, atol=1e-5)
        x = block(x)
        assert_close(out.taps[layer, 'hidden'], x, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('kinds', SUBSETS)
def test_encode__truncated_run_equals_full_run(kinds, qkv_bias):
    vit, images = tiny_vit(qkv_bias=qkv_bias), random(2, 3, 32, 32)
    full = encode(vit, images, EVERYTHING)
    short = encode(vit, images, {2: kinds})
    assert set(short.taps) == {(2, kind) for kind in kinds}
    for key, tapped in short.taps.items():
        assert_close(tapped, full.taps[key], rtol=0.0, atol=1e-6)
    gaps = [(full.taps[2, a] - full.taps[2, b]).abs().max() for a, b in ('qk', 'kv', 'qv')]
    assert min(gaps) > 0.1


def forbid(module):
    def refuse(*_):
        raise RuntimeError('ran too deep')

    module.register_forward_pre_hook(refuse)


@pytest.mark.parametrize('kind', ['hidden', 'features', 'q'])
def test_encode__runs_no_block_beyond_the_deepest_tap(kind):
    vit, images = tiny_vit(), random(2, 3, 32, 32)
    taps = {2: frozenset({kind})}
    free = encode(vit, images, taps).taps[2, kind]
    forbid(vit.layers[3])
    assert torch.equal(encode(vit, images, taps).taps[2, kind], free)
    with pytest.raises(RuntimeError, match='ran too deep'):
        encode(vit, images, {3: frozenset({'hidden'})})


def test_encode__runs_of_the_last_block_what_qkv_need():
    vit, images = tiny_vit(), random(2, 3, 32, 32)
    hidden = encode(vit, images, {1: frozenset({'hidden'}), 2: frozenset('q')})
    for module in (vit.layers[3], vit.layers[2].attn.qkv, vit.layers[2].attn.proj, vit.layers[2].ffn, vit.ln1):
        forbid(module)
    again = encode(vit, images, {1: frozenset({'hidden'}), 2: frozenset('q')})
    for key in hidden.taps:
        assert torch.equal(again.taps[key], hidden.taps[key])
    with pytest.raises(RuntimeError, match='ran too deep'):
        encode(vit, images, {2: frozenset({'hidden'})})


@pytest.mark.parametrize('kwargs', VARIANTS)
@pytest.mark.parametrize('taps', [
    {0: frozenset('q')},
    {1: frozenset('qk')},
    {3: frozenset('kv')},
    {2: frozenset({'hidden'})},
    {3: frozenset({'hidden'})},
    {3: frozenset({'features'})},
    {0: frozenset('v'), 2: frozenset({'q', 'hidden'})},
    {1: frozenset('qk'), 3: frozenset({'features'})},
    {1: frozenset({'hidden'}), 2: frozenset('q')},
])
def test_unused_parameters__are_those_without_gradient(taps, kwargs):
    vit = tiny_vit(**kwargs)
    out = encode(vit, random(2, 3, 32, 32), taps)
    sum((x * random(*x.shape, seed=i)).sum() for i, x in enumerate(out.taps.values())).backward()
    without = [name for name, parameter in vit.named_parameters() if parameter.grad is None]
    assert unused_parameters(vit, taps) == without
    assert (len(without) == 0) == ('features' in taps.get(DEPTH - 1, ()))


def test_freeze_unused__leaves_a_gradient_for_every_trainable_parameter():
    vit, taps = tiny_vit(), {2: frozenset('qk')}
    names = vit.freeze_unused(taps)
    assert names == unused_parameters(vit, taps)
    assert [name for name, parameter in vit.named_parameters() if not parameter.requires_grad] == names
    sum(x.square().sum() for x in encode(vit, random(2, 3, 32, 32), taps).taps.values()).backward()
    trained = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    assert len(trained) + len(names) == len(list(vit.parameters()))
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0 for parameter in trained)


def test_encode__reducer_drops_patches_and_keeps_their_numbers():
    vit, images = without_blocks(tiny_vit()), random(2, 3, 32, 32)
    tokens, _ = embed(vit, images)
    first, second = random_keep_ids(2, 16, 9), random_keep_ids(2, 9, 4, seed=1)
    seen = {}

    def reduce(index, recorded):
        seen[index] = sorted(recorded)
        return {1: first, 3: second}.get(index)

    out = encode(vit, images, EVERYTHING, reduce)
    ids = {0: None, 1: first, 2: first, 3: first.gather(1, second)}
    for layer in range(DEPTH):
        assert seen[layer] == sorted((deeper, kind) for deeper in range(layer) for kind in EVERYTHING[0])
        hidden = out.taps[layer, 'hidden']
        assert torch.equal(hidden[:, :1], tokens[:, :1])
        if ids[layer] is None:
            assert out.keep_ids[layer] is None
            assert torch.equal(hidden, tokens)
            continue
        assert torch.equal(out.keep_ids[layer], ids[layer])
        for image in range(2):
            assert torch.equal(hidden[image, 1:], tokens[image, 1 + ids[layer][image]])


def test_encode__dropped_patches_are_not_attended_to():
    vit, images, keep_ids = tiny_vit(), random(2, 3, 32, 32), random_keep_ids(2, 16, 5)
    out = encode(vit, images, FEATURES, lambda index, _: keep_ids if index == 0 else None)
    tokens, _ = embed(vit, images)
    for image in range(2):
        x = torch.cat([tokens[image, :1], tokens[image, 1 + keep_ids[image]]]).unsqueeze(0)
        for block in vit.layers:
            x = block(x)
        assert_close(out.taps[DEPTH - 1, 'features'][image], vit.ln1(x)[0], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize('height, width', [(36, 32), (32, 30)])
def test_embed__image_is_not_a_multiple_of_the_patch(height, width):
    message = f'images of {height}x{width} pixels cannot be cut into patches of 8x8: choose a crop size'
    with pytest.raises(ValueError, match=message):
        encode(tiny_vit(), random(1, 3, height, width), FEATURES)


def test_vit_spec__reads_the_model():
    spec = vit_spec(tiny_vit(embed_dims=24, depth=3, num_heads=4, with_cls_token=False))
    facts = (spec.embed_dims, spec.depth, spec.num_heads, spec.patch_size, spec.num_extra_tokens)
    assert facts == (24, 3, 4, 8, 0)
