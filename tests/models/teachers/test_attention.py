import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from mmhdistill.models.teachers.attention import AttentionReader, BlockReader
from tests.helpers import randomise

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 12, 3
QKV = frozenset('qkv')


class Attention(nn.Module):
    """Self-attention with the variations that ViTs differ in."""

    def __init__(self, separate=False, norm=False, angle=None, scale=None, fused=True, bias=False, **options):
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)]) if separate \
            else nn.Linear(WIDTH, 3 * WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH // HEADS) if norm else nn.Identity() for _ in range(2)])
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.separate, self.angle, self.scale, self.fused, self.options = separate, angle, scale, fused, options
        if bias:
            self.options['attn_mask'] = torch.randn(TOKENS, TOKENS)

    def project(self, x):
        """q, k, v before norm and rotation, (B, N, C)."""
        return [part(x) for part in self.qkv] if self.separate else self.qkv(x).chunk(3, dim=-1)

    def forward(self, x):
        q, k, v = (heads(part) for part in self.project(x))
        q, k = (rotate(norm(part), self.angle) for norm, part in zip(self.norms, (q, k)))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale, **self.options)
        else:
            y = (q @ k.transpose(-2, -1) / q.shape[-1]**0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):

    def __init__(self, attention=None, output=lambda x: x):
        super().__init__()
        self.norm, self.attention, self.output = nn.LayerNorm(WIDTH), attention or Attention(), output
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.output(x + self.attention(self.norm(x)))


class Model(nn.Module):

    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        randomise(self)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.norm(x)


def heads(x):
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def merge(x):
    return x.transpose(1, 2).flatten(2)


def rotate(x, angle):
    """A rotary embedding: pairs of channels turned by ``angle`` times the token's index."""
    if angle is None:
        return x
    angles = angle * torch.arange(x.shape[-2]).view(-1, 1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def tokens(batch=BATCH):
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(module, x=None):
    """The one call that is recorded, as a list of q, k, v, and the output."""
    x = tokens() if x is None else x
    with AttentionReader() as reader:
        out = module(x)
    assert len(reader.calls) == 1
    assert list(reader.calls[0]) == ['q', 'k', 'v']
    return list(reader.calls[0].values()), out


def attend(q, k, v):
    """Attention from what was recorded, (B, N, C): the product scaled by the square root of the head's width."""
    q, k, v = (heads(x) for x in (q, k, v))
    return merge((q @ k.transpose(-2, -1) / (WIDTH // HEADS)**0.5).softmax(-1) @ v)


def assert_nothing_left(model):
    assert _get_current_function_mode_stack() == []
    assert [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


@torch.no_grad()
def run(model, taps, x=None):
    x = tokens() if x is None else x
    try:
        return BlockReader(model.blocks, model.norm)(lambda: model(x), taps)
    finally:
        assert_nothing_left(model)


@pytest.mark.parametrize('separate', [False, True])
def test_attention_reader__projections(separate):
    attention = randomise(Attention(separate))
    found, out = read(attention)
    with torch.no_grad():
        for own, expected in zip(found, attention.project(tokens())):
            torch.testing.assert_close(own, expected, rtol=0, atol=0)
        torch.testing.assert_close(attention.proj(attend(*found)), out, rtol=0, atol=1e-6)


def test_attention_reader__norms_of_q_and_k():
    attention = randomise(Attention(norm=True))
    (q, k, v), _ = read(attention)
    with torch.no_grad():
        before = attention.project(tokens())
        for own, raw, norm in zip((q, k), before, attention.norms):
            torch.testing.assert_close(own, merge(norm(heads(raw))), rtol=0, atol=0)
            assert (own - raw).abs().max() > 0.5
    torch.testing.assert_close(v, before[2], rtol=0, atol=0)


def test_attention_reader__rotary_embedding_is_in_the_relation():
    attention = randomise(Attention(angle=0.7))
    (q, k, v), _ = read(attention)
    with torch.no_grad():
        before = attention.project(tokens())
    for own, raw in zip((q, k), before):
        torch.testing.assert_close(own, merge(rotate(heads(raw), 0.7)), rtol=0, atol=0)
    relation, unrotated = (heads(a) @ heads(b).transpose(-2, -1) for a, b in ((q, k), before[:2]))
    assert (relation - unrotated).abs().max() > 0.1
    # Token 0 is not turned.
    torch.testing.assert_close(relation[..., 0, 0], unrotated[..., 0, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('scale', [0.11, 1.0, 3.0])
def test_attention_reader__another_scale_is_in_q(scale):
    attention = randomise(Attention(scale=scale))
    found, out = read(attention)
    with torch.no_grad():
        torch.testing.assert_close(attention.proj(attend(*found)), out, rtol=0, atol=1e-6)
        raw, _, _ = attention.project(tokens())
    torch.testing.assert_close(found[0], raw * scale * 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('batch_first', [False, True])
def test_attention_reader__multihead_attention(batch_first, training):
    """In eval mode and without gradients, torch has a kernel of its own for all of it."""
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)).train(training)
    x = tokens()
    given = x if batch_first else x.transpose(0, 1)
    found, (out, _) = read(lambda y: attention(y, y, y, need_weights=False), given)
    with torch.no_grad():
        for own, expected in zip(found, F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)):
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)
        out = out if batch_first else out.transpose(0, 1)
        torch.testing.assert_close(attention.out_proj(attend(*found)), out, rtol=0, atol=1e-6)
        torch.testing.assert_close(attention(given, given, given)[0], out if batch_first else out.transpose(0, 1),
                                   rtol=0, atol=1e-6)


def test_attention_reader__multihead_attention_of_as_many_images_as_tokens():
    """A transposition that is wrong keeps the shape here."""
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS)).eval()
    x = tokens(batch=TOKENS)
    (q, _, _), _ = read(lambda y: attention(y, y, y), x.transpose(0, 1))
    with torch.no_grad():
        expected = F.linear(x, attention.in_proj_weight[:WIDTH], attention.in_proj_bias[:WIDTH])
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-6)
    assert (q.transpose(0, 1) - expected).abs().max() > 0.5


@pytest.mark.parametrize('options', [dict(bias=True), dict(is_causal=True)])
def test_attention_reader__masks_and_biases_are_refused(options):
    with pytest.raises(ValueError, match='^its attention adds a mask or a position bias, so q and k alone are not '
                                         'what it sees$'):
        read(Attention(**options))
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize('key', [(2, 3, 7, 4), (2, 1, 5, 4)])
def test_attention_reader__other_keys_than_queries_are_refused(key):
    """Cross attention, and key heads that queries share."""
    q, k = torch.zeros(2, 3, 5, 4), torch.zeros(key)
    with pytest.raises(ValueError, match='not of the same heads and tokens$'), AttentionReader():
        F.scaled_dot_product_attention(q, k, k, enable_gqa=key[1] == 1)
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize('made, called, other', [
    (dict(), dict(attn_mask=torch.zeros(TOKENS, TOKENS)), False),
    (dict(), dict(key_padding_mask=torch.zeros(BATCH, TOKENS, dtype=torch.bool)), False),
    (dict(add_bias_kv=True), dict(), False),
    (dict(add_zero_attn=True), dict(), False),
    (dict(kdim=WIDTH, vdim=WIDTH), dict(), True),
    (dict(kdim=8, vdim=8), dict(), True),
])
def test_attention_reader__multihead_attention_that_is_no_self_attention_is_refused(made, called, other):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **made).eval()
    key = torch.zeros(BATCH, TOKENS, made.get('kdim', WIDTH)) if other else tokens()
    x = key if not other else tokens()
    with pytest.raises(ValueError, match='^its nn.MultiheadAttention is no plain self-attention$'), \
            AttentionReader():
        attention(x, key, key, **called)
    assert _get_current_function_mode_stack() == []


def test_block_reader__reads_what_blocks_see_and_return():
    model = Model(*(Block(Attention(separate=bool(i))) for i in range(3)))
    taps = {0: QKV, 1: frozenset({'hidden', 'k'}), 2: frozenset({'features', 'hidden', 'v'})}
    out = run(model, taps)
    assert set(out) == {(0, 'q'), (0, 'k'), (0, 'v'), (1, 'hidden'), (1, 'k'), (2, 'features'), (2, 'hidden'), (2, 'v')}
    x = tokens()
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            projected = dict(zip('qkv', block.attention.project(block.norm(x))))
            x = block(x)
            expected = dict(projected, hidden=x, features=model.norm(x))
            for kind in taps[index]:
                torch.testing.assert_close(out[index, kind], expected[kind], rtol=0, atol=0)


def test_block_reader__runs_no_deeper_than_asked():
    model = Model(*(Block() for _ in range(4)))
    run(model, {1: frozenset('q')})
    assert [len(block.seen) for block in model.blocks] == [1, 1, 0, 0]
    run(model, {0: frozenset({'hidden'}), 2: frozenset({'hidden'})})
    assert [len(block.seen) for block in model.blocks] == [2, 2, 1, 0]


def test_block_reader__blocks_that_return_tuples():
    model = Model(Block(), Block(output=lambda x: (x, 'attention weights')))
    plain = Model(Block(), Block())
    plain.load_state_dict(model.state_dict())
    taps = {1: frozenset({'hidden', 'features'})}
    expected = run(plain, taps)
    for key, found in run(model, taps).items():
        torch.testing.assert_close(found, expected[key], rtol=0, atol=0)


def test_block_reader__encoder_layers_of_torch():
    """Their kernel for a whole layer would leave nothing to be read."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)
    model = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    x = tokens()
    with torch.no_grad():
        out = BlockReader(model.layers, None)(lambda: model(x), {0: QKV, 1: frozenset({'q', 'hidden'})})
        attention = model.layers[0].self_attn
        expected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        for kind, value in zip('qkv', expected):
            torch.testing.assert_close(out[0, kind], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(out[1, 'hidden'], model(x), rtol=0, atol=1e-5)
    assert_nothing_left(model)


@pytest.mark.parametrize('attention, count', [(Attention(fused=False), 0), (nn.Linear(WIDTH, WIDTH), 0),
                                              (nn.Sequential(Attention(), Attention()), 2)])
def test_block_reader__one_attention_a_block_is_expected(attention, count):
    model = Model(Block(), Block(attention))
    with pytest.raises(ValueError, match=f'^block 1 computes attention {count} times through '
                                         'scaled_dot_product_attention or nn.MultiheadAttention, and once is expected'):
        run(model, {0: QKV, 1: frozenset('q')})
    # What such a block returns can be read all the same.
    assert run(model, {1: frozenset({'hidden'})})[1, 'hidden'].shape == (BATCH, TOKENS, WIDTH)


@pytest.mark.parametrize('attention', [Attention(bias=True), Attention(is_causal=True)])
def test_block_reader__nothing_is_left_behind_when_attention_is_refused(attention):
    model = Model(Block(), Block(attention))
    with pytest.raises(ValueError, match='adds a mask or a position bias'):
        run(model, {0: QKV, 1: QKV})
    with torch.no_grad():
        expected = model.blocks[0].attention.project(model.blocks[0].norm(tokens()))[0]
    torch.testing.assert_close(run(model, {0: QKV})[0, 'q'], expected, rtol=0, atol=0)


def test_block_reader__nothing_is_left_behind_when_the_model_fails():
    model = Model(Block(), Block(nn.Linear(7, WIDTH)))
    with pytest.raises(RuntimeError, match='mat1 and mat2'):
        run(model, {0: QKV, 1: QKV})


@pytest.mark.parametrize('norm', [None, nn.Identity()])
def test_block_reader__features_need_a_final_norm(norm):
    model = Model(Block(), Block())
    model.norm = norm
    with pytest.raises(ValueError, match='^it has no final norm of its tokens'):
        run(model, {1: frozenset({'features'})})
    assert [len(block.seen) for block in model.blocks] == [0, 0]


def test_block_reader__a_block_that_runs_twice_is_refused():
    model = Model(Block(), Block(), Block())
    order = nn.ModuleList([model.blocks[i] for i in (0, 1, 0, 2)])
    with pytest.raises(ValueError, match='^block 0 runs, or is, more than once$'), torch.no_grad():
        BlockReader(model.blocks, None)(lambda: nn.Sequential(*order)(tokens()), {0: QKV, 2: QKV})
    assert_nothing_left(model)


def test_block_reader__one_block_in_two_places_is_refused():
    block = Block()
    model = Model(block, block)
    with pytest.raises(ValueError, match='^block 1 runs, or is, more than once$'):
        run(model, {0: QKV, 1: QKV})


def test_block_reader__blocks_that_the_forward_leaves_out():
    model = Model(Block(), Block(), Block())
    with pytest.raises(ValueError, match=r'^its forward did not run blocks \[1, 2\]$'), torch.no_grad():
        BlockReader(model.blocks, None)(lambda: model.blocks[0](tokens()), {0: QKV, 1: QKV, 2: frozenset({'hidden'})})
    assert_nothing_left(model)
