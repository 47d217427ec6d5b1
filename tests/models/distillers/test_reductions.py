"""The distiller configured as another method is that method: loss and gradients of a formula written out for it."""
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config

from mmhdistill.models.maskers import RandomScorer
from tests.helpers import build_distiller, narrow, random_images, tiny_teacher

ROOT = Path(__file__).parents[3]
RANDOM = dict(type='mmhdistill.ProgressiveTokenMasker', place='input', num_stages=1, keep_rate=0.25,
              scorer=dict(type='mmhdistill.RandomScorer'))
ALIGN = dict(type='mmhdistill.FeatureLoss', projector=dict(type='mmhdistill.MLPProjector'), include_cls=True)
IMAGES = random_images(3)


def shipped(name):
    """The losses and the masker of a baseline as it is shipped, for narrow models."""
    return narrow(Config.fromfile(ROOT / f'configs/baselines/{name}_300e.py').model.to_dict())


def forward(vit, images, keep=None):
    """Tokens after the final norm, the qkv of each block, and the tokens after it; with ``keep`` (B, K), of these
    patches alone."""
    tokens = vit.patch_embed(images)[0] + vit.pos_embed[:, 1:]
    if keep is not None:
        tokens = pick(tokens, keep)
    class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens, qkv = vit.pre_norm(torch.cat([class_token, tokens], dim=1)), []
    hidden = []
    for block in vit.layers:
        qkv.append(block.attn.qkv(block.ln1(tokens)))
        tokens = block(tokens)
        hidden.append(tokens)
    return vit.ln1(tokens), qkv, hidden


def pick(tokens, ids):
    """(B, N, C), (B, K) -> (B, K, C)"""
    return torch.stack([x[i] for x, i in zip(tokens, ids)])


def least_similar(hidden):
    """Of 16 patches those that three stages leave: 11 of 16, 8 of 11, 5 of 8, scored at layers 0, 4 and 8 of 12."""
    kept = torch.arange(16).expand(len(hidden[0]), -1)
    for layer, count in ((0, 11), (4, 8), (8, 5)):
        unit = F.normalize(pick(hidden[layer][:, 1:], kept), dim=-1)
        similarity = unit @ unit.transpose(1, 2)
        others = similarity.masked_fill(torch.eye(kept.shape[1], dtype=torch.bool), 0).sum(dim=-1)
        kept = pick(kept, others.argsort(dim=1)[:, :count].sort(dim=1).values)
    return kept


def relation_kl(pairs, heads):
    """KL of the softmaxes of a b^T / sqrt(d) of each head, ``pairs`` of the teacher's and the student's (a, b)."""

    def relation(a, b):
        a, b = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a, b))
        return (a @ b.transpose(-2, -1) / math.sqrt(a.shape[-1])).softmax(dim=-1)

    relations = [(relation(*teacher), relation(*student)) for teacher, student in pairs]
    return sum((t * (t / s).log()).sum(dim=-1).mean() for t, s in relations)


def smooth_l1(prediction, teacher_tokens, beta=2.0):
    target = F.layer_norm(teacher_tokens, teacher_tokens.shape[-1:], eps=1e-6)
    difference = (prediction - target).abs()
    return torch.where(difference < beta, difference**2 / (2 * beta), difference - beta / 2).mean()


@pytest.fixture
def build(monkeypatch):
    """A distiller whose random masker draws the scores that the test knows."""
    scores = torch.rand(len(IMAGES), 16, generator=torch.Generator().manual_seed(3))

    def make(**kwargs):
        model = build_distiller(**{'masker': None, **kwargs})
        if isinstance(getattr(model.masker, 'scorer', None), RandomScorer):
            monkeypatch.setattr(type(model.masker.scorer), '__call__', lambda *_: scores)
        return model.double().eval()

    order = scores.argsort(dim=1)
    make.keep, make.drop = order[:, :4].sort().values, order[:, 4:].sort().values
    return make


def assert_same(model, formula):
    """Every loss, and every gradient of the student and its heads, to 1e-6 of its size."""
    images = IMAGES.double()
    losses = model(images, mode='loss')
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(sum(losses.values()), parameters.values())
    with torch.no_grad():
        taught = {name: forward(teacher.vit, images * teacher.scale + teacher.shift)
                  for name, teacher in model.teachers.items()}
    expected = formula(taught, images)
    theirs = torch.autograd.grad(sum(expected.values()), parameters.values())
    assert {f'loss/{name}' for name in expected} == set(losses)
    for name, value in expected.items():
        assert value > 1e-3
        assert losses[f'loss/{name}'].item() == pytest.approx(value.item(), rel=1e-6)
    for name, mine, other in zip(parameters, ours, theirs):
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max(), name
        # A bias of keys shifts a row of scores alike and has none.
        assert other.abs().max() > 1e-9, name


def test_fd(build):
    """Feature Distillation: whitened features of all patches, linear projector, SmoothL1 with beta 2."""
    model = build(**shipped('fd_vit-b_clip'))
    projector = model.losses['feature'].projector.proj

    def formula(taught, images):
        student = forward(model.backbone, images)[0]
        return dict(feature=smooth_l1(F.linear(student[:, 1:], projector.weight, projector.bias),
                                      taught['clip'][0][:, 1:]))

    assert_same(model, formula)


def test_tinymim(build):
    """TinyMIM: qk and vv relations, class token included, of layers 8 and 11, in 12 relation heads of unequal width."""
    model = build(**shipped('tinymim_vit-s_mae-b'))

    def formula(taught, images):
        (tq, tk, tv), (sq, sk, sv) = (
            qkv.chunk(3, dim=-1) for qkv in (taught['mae'][1][8], forward(model.backbone, images)[1][11]))
        return dict(relation=relation_kl([((tq, tk), (sq, sk)), ((tv, tv), (sv, sv))], heads=12))

    assert_same(model, formula)


def test_hybrid_distill__features_alone(build):
    """Hybrid Distill with a weight of 0 for the relations: the teacher's features at the tokens that it scored."""
    model = build(**shipped('hdistill-cl-only_vit-b_clip'))
    projector = model.losses['feature'].projector.proj

    def formula(taught, images):
        features, _, hidden = taught['clip']
        kept = least_similar(hidden)
        student = forward(model.backbone, images, kept)[0][:, 1:]
        return dict(feature=smooth_l1(F.linear(student, projector.weight, projector.bias),
                                      pick(features[:, 1:], kept)))

    assert list(model.teachers) == ['clip']
    assert_same(model, formula)


def test_hybrid_distill__relations_alone(build):
    """Hybrid Distill with a weight of 0 for the features: qk relations of layers 8 to 10 among the kept patches."""
    model = build(**shipped('hdistill-mim-only_vit-b_mae'))

    def formula(taught, images):
        _, teacher, hidden = taught['mae']
        kept = least_similar(hidden)
        student = forward(model.backbone, images, kept)[1]
        pairs = [(pick(teacher[layer][:, 1:], kept).chunk(3, dim=-1)[:2], student[layer][:, 1:].chunk(3, dim=-1)[:2])
                 for layer in (8, 9, 10)]
        return dict(relation=relation_kl(pairs, heads=4))

    assert list(model.teachers) == ['mae']
    assert_same(model, formula)


@pytest.mark.parametrize('depth', [1, 2])
def test_masked_feature_reconstruction(build, depth):
    """A student of the kept patches, a decoder with mask tokens, the teacher's features at the dropped patches."""
    settings = shipped('mfr_vit-b_clip')
    if depth > 1:
        settings['losses']['reconstruction']['decoder']['depth'] = depth
    model = build(**settings)
    decoder = model.losses['reconstruction'].projector
    assert [layer.attn.num_heads for layer in decoder.layers] == [8] * depth
    with torch.no_grad():
        decoder.mask_token.normal_(generator=torch.Generator().manual_seed(5))

    def position(index):
        angles = [side / 10000**(i / 128) for side in divmod(index, 4) for i in range(128)]
        row, column = angles[:128], angles[128:]
        return [f(a) for part in (row, column) for f in (math.sin, math.cos) for a in part]

    def formula(taught, images):
        student = forward(model.backbone, images, build.keep)[0]
        inputs = decoder.embed(student)
        rows = []
        for image, keep in enumerate(build.keep.tolist()):
            patches = [inputs[image, 1 + keep.index(i)] if i in keep else decoder.mask_token[0, 0] for i in range(16)]
            rows.append(torch.stack([inputs[image, 0]] + [
                patch + torch.tensor(position(i)).double() for i, patch in enumerate(patches)]))
        tokens = torch.stack(rows)
        for layer in decoder.layers:
            tokens = layer(tokens)
        predicted = decoder.predict(decoder.norm(tokens))[:, 1:]
        target = taught['clip'][0][:, 1:]
        return dict(reconstruction=smooth_l1(pick(predicted, build.drop), pick(target, build.drop)))

    assert_same(model, formula)


@pytest.mark.parametrize('teachers', [('moco', ), ('mae', ), ('moco', 'mae')])
def test_moma(build, teachers):
    """MOMA: teachers on the whole image, the student on a masked one, two-layer projectors, class token and patches."""
    model = build(
        masker=RANDOM, teachers=dict(moco=tiny_teacher(name='moco', embed_dims=48), mae=tiny_teacher(name='mae')),
        losses={name: dict(teacher=name, **ALIGN) for name in teachers})
    assert set(model.teachers) == set(teachers)

    def formula(taught, images):
        student = forward(model.backbone, images, build.keep)[0]
        found = {}
        for name in teachers:
            first, _, second = model.losses[name].projector.layers
            predicted = F.linear(F.gelu(F.linear(student, first.weight, first.bias)), second.weight, second.bias)
            tokens = taught[name][0]
            kept = torch.cat([tokens[:, :1], pick(tokens[:, 1:], build.keep)], dim=1)
            found[name] = smooth_l1(predicted, kept)
        return found

    assert_same(model, formula)
