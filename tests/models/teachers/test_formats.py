"""Formats as tables of names; the files of mmpretrain and of our own runs, against mmpretrain's models."""
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.runner import Runner, save_checkpoint
from mmpretrain.registry import MODELS as MMPRETRAIN
from torch.utils.data import DataLoader

from mmhdistill.models.teachers import ViTTeacher, find_card
from mmhdistill.models.teachers.formats import FORMATS, assemble, plan, recognise
from tests.helpers import build_distiller, random_images, tiny_card

from .native import (
    DEPTH,
    OBLONG,
    TOLERANCE,
    disturb,
    error,
    images,
    load,
    moco_v3_positions,
    native_taps,
    normalise,
    small_card,
)

WIDTH, HEADS = 48, 4
ARCH = dict(embed_dims=WIDTH, num_layers=DEPTH, num_heads=HEADS, feedforward_channels=4 * WIDTH)
BACKBONE = dict(type='VisionTransformer', arch=ARCH, img_size=224, patch_size=16)
PLAIN = 3 * 12 + 6
BY_NAME = {fmt.name: fmt for fmt in FORMATS}


def vit_taps(vit, x):
    return native_taps(lambda: vit(x), vit.layers, vit.ln1, lambda block: [(block.attn.qkv, lambda out: out)])


def imagenet(x):
    return normalise(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def compare(vit, path, grids=((14, 14), OBLONG), card='mae-vit-b-p16', **kwargs):
    """mmpretrain's own rule at another size is MAE's."""
    vit.eval()
    teacher = load(small_card(card, WIDTH, HEADS), path, **kwargs)
    for grid in grids:
        x = images(grid, 16)
        assert error(teacher, vit_taps(vit, imagenet(x)), x, grid) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.format, receipt.matched) == ('mmpretrain', PLAIN)
    return receipt


def build(config, seed=0):
    model = MMPRETRAIN.build(config)
    disturb(model, seed)
    return model


def classifier(**kwargs):
    return dict(type='ImageClassifier', backbone=dict(BACKBONE, **kwargs),
                head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=WIDTH))


def test_mmpretrain__bare_backbone(tmp_path):
    vit = build(BACKBONE)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    receipt = compare(vit, tmp_path / 'vit.pth')
    assert (receipt.prefix, receipt.entry, receipt.unused) == ('', '', [])


def test_mmpretrain__image_classifier(tmp_path):
    model = build(classifier())
    save_checkpoint({'meta': {'epoch': 1, 'dataset_meta': {'classes': ['a']}}, 'state_dict': model.state_dict(),
                     'optimizer': torch.optim.SGD(model.parameters(), 0.1).state_dict(),
                     'message_hub': {'log_scalars': {}}}, str(tmp_path / 'epoch_1.pth'))
    receipt = compare(model.backbone, tmp_path / 'epoch_1.pth')
    assert (receipt.prefix, receipt.entry) == ('backbone.', 'state_dict')
    assert sorted(receipt.unused) == ['head.layers.head.bias', 'head.layers.head.weight', 'message_hub', 'meta',
                                      'optimizer']


def test_mmpretrain__mae_with_neck(tmp_path):
    model = build(dict(
        type='MAE', backbone=dict(BACKBONE, type='MAEViT'),
        neck=dict(type='MAEPretrainDecoder', num_patches=196, patch_size=16, embed_dim=WIDTH, decoder_embed_dim=16,
                  decoder_depth=1, decoder_num_heads=2),
        head=dict(type='MAEPretrainHead', patch_size=16, loss=dict(type='PixelReconstructionLoss', criterion='L2'))))
    vit = MMPRETRAIN.build(BACKBONE)
    vit.load_state_dict(model.backbone.state_dict())
    save_checkpoint({'state_dict': model.state_dict()}, str(tmp_path / 'mae.pth'))
    receipt = compare(vit, tmp_path / 'mae.pth')
    assert receipt.prefix == 'backbone.'
    assert sorted(receipt.unused) == sorted(
        [name for name in model.state_dict() if not name.startswith('backbone.')])


def test_mmpretrain__runner_with_ema_gives_the_averaged_weights(tmp_path):
    model = build(dict(classifier(img_size=32), data_preprocessor=dict(mean=[0.0] * 3, std=[1.0] * 3)))
    batch = [dict(inputs=image, data_samples=sample) for image, sample in zip(random_images(2), samples())]
    runner = Runner(
        model, str(tmp_path), train_dataloader=DataLoader(batch, batch_size=2, collate_fn=collate),
        train_cfg=dict(by_epoch=True, max_epochs=3), optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0)),
        custom_hooks=[dict(type='EMAHook', momentum=0.25)], experiment_name='ema', default_scope='mmpretrain',
        log_level='ERROR')
    runner.train()
    ema, = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    averaged, last = ema.ema_model.module.backbone, model.backbone
    moved = max((a - b).abs().max() for a, b in zip(averaged.parameters(), last.parameters()))
    assert moved > 1e-3
    card = find_card(tiny_card(embed_dims=WIDTH, num_heads=HEADS, patch_size=16))
    teacher, x = load(card, tmp_path / 'epoch_3.pth'), images((2, 2), 16)
    averaged.eval()
    last.eval()
    assert error(teacher, vit_taps(averaged, imagenet(x)), x, (2, 2)) <= TOLERANCE
    assert error(teacher, vit_taps(last, imagenet(x)), x, (2, 2)) > 100 * TOLERANCE
    assert (teacher.receipt.entry, teacher.receipt.prefix) == ('state_dict', 'backbone.')
    assert 'ema_state_dict' in teacher.receipt.unused
    # The weights of the last step are there by name.
    teacher = load(card, tmp_path / 'epoch_3.pth', entry='ema_state_dict')
    assert error(teacher, vit_taps(last, imagenet(x)), x, (2, 2)) <= TOLERANCE
    assert teacher.receipt.prefix == 'module.backbone.'


def samples():
    from mmpretrain.structures import DataSample
    return [DataSample().set_gt_label(label) for label in (0, 2)]


def collate(batch):
    return {key: [item[key] for item in batch] for key in batch[0]}


def test_mmpretrain__moco_v3_takes_the_backbone(tmp_path):
    mlp = dict(type='NonLinearNeck', in_channels=WIDTH, hid_channels=16, out_channels=16, num_layers=2)
    model = build(dict(
        type='MoCoV3', backbone=dict(BACKBONE, type='MoCoV3ViT'), neck=mlp,
        head=dict(type='MoCoV3Head', predictor=dict(mlp, in_channels=16), temperature=0.2,
                  loss=dict(type='CrossEntropyLoss', loss_weight=0.4))))
    with torch.no_grad():
        for part, sign in ((model.backbone, 1.0), (model.momentum_encoder.module[0], -1.0)):
            part.patch_embed.projection.weight.mul_(sign)
            part.pos_embed.copy_(moco_v3_positions((14, 14), WIDTH))
    path = tmp_path / 'mocov3.pth'
    save_checkpoint({'state_dict': model.state_dict()}, str(path))
    for card in ('mocov3-vit-s-p16', 'mocov3-vit-b-p16'):
        receipt = compare(model.backbone, path, grids=[(14, 14)], card=card)
        assert receipt.prefix == 'backbone.'
    assert any(name.startswith('momentum_encoder.module.0.') for name in receipt.unused)
    receipt = compare(model.momentum_encoder.module[0], path, grids=[(14, 14)], card='mocov3-vit-b-p16',
                      prefix='momentum_encoder.module.0.')
    assert receipt.prefix == 'momentum_encoder.module.0.'


@torch.no_grad()
def test_own__student_of_a_distiller(tmp_path):
    model = build_distiller()
    save_checkpoint({'meta': {}, 'state_dict': model.state_dict()}, str(tmp_path / 'epoch_1.pth'))
    arch = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
    vit = MMPRETRAIN.build(dict(type='VisionTransformer', arch=arch, img_size=32, patch_size=8))
    vit.load_state_dict(model.backbone.state_dict())
    vit.eval()
    teacher, x = load(find_card(tiny_card(mlp_ratio=2.0)), tmp_path / 'epoch_1.pth'), images((4, 4), 8, batch=2)
    assert error(teacher, vit_taps(vit, imagenet(x)), x, (4, 4)) <= TOLERANCE
    receipt = teacher.receipt
    assert (receipt.format, receipt.prefix, receipt.matched) == ('mmpretrain', 'backbone.', PLAIN)
    assert {name.split('.')[0] for name in receipt.unused} == {'losses', 'meta'}
    assert any('projector' in name for name in receipt.unused)


def natives():
    """Name of the format -> keys of a native model in it, without memory."""
    import open_clip
    import timm
    import transformers
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    arch = dict(ARCH, num_layers=1)
    with torch.device('meta'):
        models = {
            'mmpretrain': MMPRETRAIN.build(dict(BACKBONE, arch=arch)),
            'timm': timm.create_model('vit_tiny_patch16_224', depth=1),
            'openai-clip': open_clip.model.CLIP(8, dict(layers=1, width=64), dict(layers=1, width=64, heads=1)),
            'huggingface-clip': transformers.SiglipModel(
                transformers.SiglipConfig(vision_config=size, text_config={**size, 'vocab_size': 11})),
            'huggingface-dinov2': transformers.Dinov2Model(transformers.Dinov2Config(**size)),
            'huggingface-vit': transformers.ViTModel(transformers.ViTConfig(**size))
        }
    return {name: list(model.state_dict()) for name, model in models.items()}


def test_recognise__tells_the_formats_apart_under_any_prefix():
    keys = natives()
    assert list(keys) == [fmt.name for fmt in FORMATS]
    own = {'openai-clip': 'visual.', 'huggingface-clip': 'vision_model.'}
    for name, names in keys.items():
        for prefix in ('', 'backbone.', 'module.encoder.'):
            fmt, found = recognise([prefix + key for key in names])
            assert (fmt.name, found) == (name, prefix + own.get(name, ''))


@pytest.mark.parametrize('name', ['resnet18', 'swin_tiny_patch4_window7_224', 'convnext_atto', 'pvt_v2_b0'])
def test_recognise__refuses_what_is_no_plain_vit_in_timm(name):
    import timm
    with torch.device('meta'):
        names = list(timm.create_model(name).state_dict())
    with pytest.raises(ValueError, match='is in no known format: expected the keys of one of mmpretrain, timm, '
                                         'openai-clip, huggingface-clip, huggingface-dinov2, huggingface-vit; found '
                                         + ', '.join(names[:3])):
        recognise(names)


def test_recognise__refuses_what_is_no_plain_vit_elsewhere():
    import open_clip
    import transformers
    swin = dict(embed_dims=12, depths=[1, 1], num_heads=[1, 2])
    models = [
        MMPRETRAIN.build(dict(type='SwinTransformer', arch=swin, out_indices=(1, ))),
        MMPRETRAIN.build(dict(type='ResNet', depth=18)),
        transformers.SwinModel(transformers.SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[1, 2])),
        open_clip.model.CLIP(8, dict(layers=[1, 1, 1, 1], width=16, head_width=16), dict(layers=1, width=64, heads=1))
    ]
    for model in models:
        with pytest.raises(ValueError, match='is in no known format'):
            recognise(model.state_dict())


TIMM = ['patch_embed.proj.weight', 'blocks.0.norm1.weight']


def under(*prefixes):
    return [prefix + name for prefix in prefixes for name in TIMM]


@pytest.mark.parametrize('prefixes, preferred', [
    (['teacher.', ''], ''), (['momentum_encoder.module.0.', 'backbone.'], 'backbone.'),
    (['module.momentum_encoder.', 'module.base_encoder.'], 'module.base_encoder.')])
def test_recognise__prefers_the_authors_choice(prefixes, preferred):
    assert recognise(under(*prefixes)) == (BY_NAME['timm'], preferred)
    for prefix in prefixes:
        assert recognise(under(*prefixes), prefix) == (BY_NAME['timm'], prefix)


def test_recognise__several_and_no_preference():
    with pytest.raises(ValueError, match=r'^holds 2 ViTs, under encoder_q\., encoder_k\.: choose one with prefix='):
        recognise(under('encoder_q.', 'encoder_k.'))
    assert recognise(under('encoder_q.', 'encoder_k.'), 'encoder_k.')[1] == 'encoder_k.'


def test_recognise__prefix_that_is_not_there():
    with pytest.raises(ValueError) as caught:
        recognise(under('encoder_q.', 'encoder_k.'), 'encoder_v.')
    assert str(caught.value) == ("holds no ViT under the prefix 'encoder_v.', but under 'encoder_q.', 'encoder_k.': "
                                 'correct prefix=...')
    with pytest.raises(ValueError) as caught:
        recognise(under(''), 'backbone.')
    assert str(caught.value) == "holds no ViT under the prefix 'backbone.', but under '': correct prefix=..."
    with pytest.raises(ValueError) as caught:
        recognise(['fc.weight'], 'backbone.')
    assert str(caught.value) == "holds no ViT under the prefix 'backbone.', nor anywhere else."


def test_recognise__vits_of_two_formats():
    """None of the formats goes before another; the authors' choice of prefix does."""
    other = ['student.patch_embed.projection.weight', 'student.layers.0.ln1.weight']
    for names in (other + under('encoder.'), under('encoder.') + other):
        with pytest.raises(ValueError, match=r'^holds 2 ViTs, under student\., encoder\.: choose one with prefix='):
            recognise(names)
    assert recognise(other + under('encoder.'), 'encoder.') == (BY_NAME['timm'], 'encoder.')
    assert recognise(other + under('encoder.'), 'student.') == (BY_NAME['mmpretrain'], 'student.')
    assert recognise(other + under('backbone.')) == (BY_NAME['timm'], 'backbone.')


def test_recognise__a_longer_name_is_not_the_marker():
    with pytest.raises(ValueError, match='is in no known format'):
        recognise(['my_patch_embed.proj.weight', 'my_blocks.0.norm1.weight'])


def test_load__several_vits_name_the_file_and_the_prefixes(tmp_path):
    torch.save(dict.fromkeys(under('encoder_q.', 'encoder_k.'), torch.ones(1)), tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=r'w\.pth holds 2 ViTs, under encoder_q\., encoder_k\.: choose one'):
        ViTTeacher(tiny_card(), str(tmp_path / 'w.pth')).load()


def test_sources__every_table():
    inner = {'mmpretrain': ('layers.7.attn.qkv.bias', ), 'timm': ('blocks.7.attn.qkv.bias', ),
             'openai-clip': ('transformer.resblocks.7.attn.in_proj_bias', ),
             'huggingface-clip': tuple(f'encoder.layers.7.self_attn.{part}_proj.bias' for part in 'qkv')}
    inner['huggingface-vit'] = inner['huggingface-dinov2'] = tuple(
        f'encoder.layer.7.attention.attention.{part}.bias' for part in ('query', 'key', 'value'))
    assert {fmt.name: fmt.sources('layers.7.attn.qkv.bias') for fmt in FORMATS} == inner
    # A part that the format does not have is asked for by our own name, and so missing.
    assert BY_NAME['openai-clip'].sources('layers.1.attn.gamma1.weight') == (
        'transformer.resblocks.1.attn.gamma1.weight', )


def test_plan__missing_unexpected_and_aside():
    keys = ['cls_token', 'patch_embed.projection.weight', 'layers.0.ln1.weight', 'layers.0.attn.gamma1.weight']
    names = ['x.cls_token', 'x.patch_embed.proj.weight', 'x.blocks.0.gamma_1', 'x.blocks.0.norm3.weight',
             'x.head.weight', 'x.decoder_pred.weight', 'head.weight', 'y.cls_token', 'x.dist_token']
    fit = plan(BY_NAME['timm'], 'x.', names, keys)
    assert fit.sources == {
        'cls_token': ('x.cls_token', ), 'patch_embed.projection.weight': ('x.patch_embed.proj.weight', ),
        'layers.0.ln1.weight': ('x.blocks.0.norm1.weight', ), 'layers.0.attn.gamma1.weight': ('x.blocks.0.gamma_1', )}
    assert fit.missing == ['x.blocks.0.norm1.weight']
    assert fit.unexpected == ['x.blocks.0.norm3.weight', 'x.dist_token']
    assert fit.aside == ['x.decoder_pred.weight', 'x.head.weight', 'head.weight', 'y.cls_token']


@pytest.mark.parametrize('name', ['register_tokens', 'reg_token', 'dist_token'])
def test_plan__registers_follow_the_class_token(name):
    fit = plan(BY_NAME['timm'], '', ['cls_token', name], ['cls_token'], registers=1)
    assert (fit.sources, fit.missing, fit.unexpected) == ({'cls_token': ('cls_token', name)}, [], [])


def test_plan__registers_that_the_file_lacks_are_missing():
    fit = plan(BY_NAME['timm'], 'a.', ['a.cls_token'], ['cls_token'], registers=4)
    assert (fit.missing, fit.used) == (['a.register_tokens'], ['a.cls_token', 'a.register_tokens'])


def tokens(*values):
    return torch.tensor(values)[:, None] * torch.ones(2)


@pytest.mark.parametrize('extra, found, expected', [
    (1, (9., 1, 2, 3, 4), (9., 1, 2, 3, 4)), (0, (1., 2, 3, 4), (1., 2, 3, 4)), (1, (1., 2, 3, 4), (0., 1, 2, 3, 4)),
    (2, (9., 8, 1, 2, 3, 4), (9., 8, 1, 2, 3, 4)), (3, (9., 1, 2, 3, 4), (9., 0, 0, 1, 2, 3, 4)),
    (0, (9., 1, 2, 3, 4), (9., 1, 2, 3, 4))])
@pytest.mark.parametrize('batch', [False, True])
def test_assemble__positions_of_extra_tokens_that_a_file_lacks_are_zero(batch, extra, found, expected):
    found = tokens(*found)
    assert torch.equal(assemble('pos_embed', [found[None] if batch else found], extra), tokens(*expected)[None])


def test_assemble__tokens_of_any_shape_one_behind_the_other():
    parts = [torch.tensor([1., 2]), torch.tensor([[[3., 4], [5, 6]]])]
    assert torch.equal(assemble('cls_token', parts, 3), torch.tensor([[[1., 2], [3, 4], [5, 6]]]))


def test_assemble__separate_projections_become_one():
    q, k, v = (torch.full((2, 2), value) for value in (1., 2., 3.))
    together = assemble('layers.0.attn.qkv.weight', [q, k, v], 1)
    assert torch.equal(together, torch.tensor([1., 1, 2, 2, 3, 3])[:, None].expand(6, 2))
    assert torch.equal(assemble('layers.0.attn.qkv.bias', [q[0], k[0], v[0]], 1), together[:, 0])
