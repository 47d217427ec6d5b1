"""The distiller configured as another method is that method: loss and gradients of a formula written out for it."""
import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import build_distiller, random_images, tiny_student, tiny_teacher

RANDOM = dict(type='mmhdistill.ProgressiveTokenMasker', place='input', num_stages=1, keep_rate=0.25,
              scorer=dict(type='mmhdistill.RandomScorer'))
ALIGN = dict(type='mmhdistill.FeatureLoss', projector=dict(type='mmhdistill.MLPProjector'), include_cls=True)
IMAGES = random_images(3)


def forward(vit, images, keep=None):
    """Tokens after the final norm, and the qkv of each block; with ``keep`` (B, K), of these patches alone."""
    tokens = vit.patch_embed(images)[0] + vit.pos_embed[:, 1:]
    if keep is not None:
        tokens = torch.stack([x[ids] for x, ids in zip(tokens, keep)])
    class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens, qkv = vit.pre_norm(torch.cat([class_token, tokens], dim=1)), []
    for block in vit.layers:
        qkv.append(block.attn.qkv(block.ln1(tokens)))
        tokens = block(tokens)
    return vit.ln1(tokens), qkv


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
        if model.masker is not None:
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
    model = build(losses=dict(feature=dict(type='mmhdistill.FeatureLoss', teacher='clip')))
    projector = model.losses['feature'].projector.proj

    def formula(taught, images):
        student, _ = forward(model.backbone, images)
        return dict(feature=smooth_l1(F.linear(student[:, 1:], projector.weight, projector.bias),
                                      taught['clip'][0][:, 1:]))

    assert_same(model, formula)


def test_tinymim(build):
    """TinyMIM: qk and vv relations, class token included, of one layer pair, in relation heads of unequal width."""
    model = build(
        backbone=tiny_student(arch=dict(embed_dims=48, num_layers=3, num_heads=4, feedforward_channels=64)),
        losses=dict(relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae', layers=[(2, 1)],
                                  kinds=('qk', 'vv'), relation_heads=8, include_extra=True)))

    def relations(qkv):
        q, k, v = (x.unflatten(-1, (8, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        return [(a @ b.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) for a, b in ((q, k), (v, v))]

    def formula(taught, images):
        _, student = forward(model.backbone, images)
        pairs = zip(relations(taught['mae'][1][1]), relations(student[2]))
        return dict(relation=sum((t * (t / s).log()).sum(dim=-1).mean() for t, s in pairs))

    assert_same(model, formula)


@pytest.mark.parametrize('depth', [1, 2])
def test_masked_feature_reconstruction(build, depth):
    """A student of the kept patches, a decoder with mask tokens, the teacher's features at the dropped patches."""
    model = build(masker=RANDOM, losses=dict(reconstruction=dict(
        type='mmhdistill.MaskedFeatureLoss', teacher='clip',
        decoder=dict(type='mmhdistill.MaskDecoder', embed_dims=24, depth=depth, num_heads=4))))
    decoder = model.losses['reconstruction'].projector
    with torch.no_grad():
        decoder.mask_token.normal_(generator=torch.Generator().manual_seed(5))

    def position(index):
        angles = [side / 10000**(i / 6) for side in divmod(index, 4) for i in range(6)]
        row, column = angles[:6], angles[6:]
        return [f(a) for part in (row, column) for f in (math.sin, math.cos) for a in part]

    def formula(taught, images):
        student, _ = forward(model.backbone, images, build.keep)
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
        at_dropped = [torch.stack([x[ids] for x, ids in zip(full, build.drop)])
                      for full in (predicted, taught['clip'][0][:, 1:])]
        return dict(reconstruction=smooth_l1(*at_dropped))

    assert_same(model, formula)


@pytest.mark.parametrize('teachers', [('moco', ), ('mae', ), ('moco', 'mae')])
def test_moma(build, teachers):
    """MOMA: teachers on the whole image, the student on a masked one, two-layer projectors, class token and patches."""
    model = build(
        masker=RANDOM, teachers=dict(moco=tiny_teacher(name='moco', embed_dims=48), mae=tiny_teacher(name='mae')),
        losses={name: dict(teacher=name, **ALIGN) for name in teachers})
    assert set(model.teachers) == set(teachers)

    def formula(taught, images):
        student, _ = forward(model.backbone, images, build.keep)
        found = {}
        for name in teachers:
            first, _, second = model.losses[name].projector.layers
            predicted = F.linear(F.gelu(F.linear(student, first.weight, first.bias)), second.weight, second.bias)
            tokens = taught[name][0]
            kept = torch.stack([torch.cat([x[:1], x[1:][ids]]) for x, ids in zip(tokens, build.keep)])
            found[name] = smooth_l1(predicted, kept)
        return found

    assert_same(model, formula)
