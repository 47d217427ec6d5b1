"""What a plan says, against closed forms, against what torch counts, and against the models that it describes."""
import json
import math
import socket
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmhdistill.analysis.plan import plan
from mmhdistill.analysis.plan_text import as_text
from mmhdistill.registry import MODELS
from tests.helpers import build_distiller, random_images, tiny_distiller, tiny_student, tiny_teacher

from .conftest import DISTILLERS, HYBRID, RANDOM, ROOT, block, load, stem, tiny_config

CONFIGS = [str(path.relative_to(ROOT)) for folder in ('hdistill', 'moma', 'baselines', 'quickstart')
           for path in sorted((ROOT / 'configs' / folder).glob('*.py'))]


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args):
        raise AssertionError('a plan needs no network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(torch, 'load', refuse)


@pytest.mark.parametrize('name', CONFIGS)
def test_plan__every_recipe(name, offline):
    cfg = load(name)
    if cfg.model.type != 'mmhdistill.HybridDistiller':
        with pytest.raises(ValueError, match=f'{Path(name).name} trains {cfg.model.type}, and only a distiller'):
            plan(cfg)
        return
    found = plan(cfg)
    json.dumps(found, allow_nan=False)
    assert list(found['losses']) == [key for key, loss in cfg.model.losses.items() if loss.get('loss_weight', 1)]
    patches = found['student']['grid'][0] * found['student']['grid'][1]
    kept, masker = patches, cfg.model.get('masker')
    if masker:
        stages = masker.get('num_stages', 3)
        kept = max(1, int(patches * masker.keep_rate**stages + 0.5))
        assert found['masker']['counts'][-1] == kept
    tokens = kept + 1
    deepest, width = found['student']['deepest_layer'], found['student']['width']
    forward = stem(width, patches, found['student']['patch_size']) + deepest * block(width, tokens)
    # The last layer runs to its end for features; for relations, its queries, keys and values are computed.
    kinds = ''.join(kind for loss in found['losses'].values() for kind in loss.get('kinds', ['features']))
    read = len(set(kinds) & set('qkv')) if 'features' not in kinds else 0
    forward += 2 * tokens * read * width**2 if read else block(width, tokens)
    for way, expected in (('this', forward), ('naive', None)):
        parts = found['flops'][way]
        assert expected in (None, parts['student_forward'])
        assert parts['student_backward'] == 2 * parts['student_forward']
        assert parts['total'] == 3 * parts['student_forward'] + sum(
            sum(parts[owner].values()) for owner in ('teachers', 'losses'))
    assert found['flops']['ratio'] == found['flops']['this']['total'] / found['flops']['naive']['total'] <= 1
    memory = found['memory']
    assert memory['total'] == sum(memory[part] for part in (
        'weights', 'gradients', 'buckets', 'optimizer', 'half_weights', 'teachers', 'images', 'teacher_outputs',
        'student', 'losses'))
    time = found['time']
    assert time['images_per_step'] == cfg.auto_scale_lr.base_batch_size
    if time['images'] is not None:
        each = math.ceil(time['images'] / time['gpus']) // cfg.train_dataloader.batch_size
        assert time['iterations'] == each * cfg.train_cfg.max_epochs
    assert found['notes'] == [] or 'only' in name or name.startswith('configs/quickstart')
    assert as_text(found).startswith(str(cfg.filename))


def test_plan__one_teacher_and_every_token():
    found = plan(load('configs/baselines/fd_vit-b_clip_300e.py'))
    forward = stem(768, 196, 16) + 12 * block(768, 197)
    assert round(forward / 1e9, 1) == 35.1
    projector = 3 * 2 * 196 * 768**2
    assert found['flops']['this'] == dict(
        student_forward=forward, student_backward=2 * forward, teachers=dict(clip=forward),
        losses=dict(feature=projector), total=4 * forward + projector)
    assert found['flops']['naive'] == found['flops']['this']
    again = load('configs/baselines/fd_vit-b_clip_300e.py')
    again.model.backbone.with_cp = True
    again = plan(again)['flops']
    assert again['this'] == dict(found['flops']['this'], student_backward=3 * forward, total=5 * forward + projector)
    assert again['naive'] == found['flops']['naive']
    assert found['parameters'] == dict(
        student=85_798_656, trained=85_798_656, frozen=0, losses=dict(feature=768 * 769),
        # CLIP's patch embedding has no bias, and it has a norm before the first block.
        teachers=dict(clip=85_798_656 - 768 + 2 * 768))
    assert found['masker'] is None


def test_plan__hybrid_distill():
    found = plan(load(HYBRID))
    assert found['masker'] == dict(
        place='input', scorer='SimilarityScorer', teacher='mae', scored_layers=[0, 4, 8], keep_rate=0.7,
        keep_rate_range=[0.7, 0.7], counts=[137, 96, 67], kept_by_layer=[67] * 12)
    whole = stem(768, 196, 16) + 12 * block(768, 197)
    # The MAE ends with the queries and keys of layer 10.
    mae = stem(768, 196, 16) + 10 * block(768, 197) + 2 * 197 * 2 * 768**2
    student = stem(768, 196, 16) + 12 * block(768, 68)

    # Scores of both, and the gradients of the student's queries and keys, of three layers.
    def losses(tokens):
        return dict(feature=3 * 2 * tokens * 768**2, relation=3 * tokens**2 * 768 * 2 * (2 + 2))

    this, naive = found['flops']['this'], found['flops']['naive']
    assert this['student_forward'] == student
    assert this['teachers'] == dict(clip=whole, mae=mae)
    assert this['losses'] == losses(67)
    assert naive['student_forward'] == whole
    assert naive['teachers'] == dict(clip=whole, mae=whole)
    assert naive['losses'] == losses(196)
    assert found['flops']['ratio'] == pytest.approx(
        (3 * student + whole + mae + sum(losses(67).values())) / (5 * whole + sum(losses(196).values())), rel=1e-12)
    relation, feature = found['losses']['relation'], found['losses']['feature']
    assert relation['layers'] == [[8, 8], [9, 9], [10, 10]]
    assert relation['tokens'] == [67] * 3
    assert (relation['kinds'], relation['relation_heads'], relation['teacher']) == ({'qk': 1.0}, 12, 'mae')
    assert (feature['layers'], feature['tokens'], feature['teacher']) == ([[11, 11]], [67], 'clip')
    assert {name: (x['deepest_layer'], x['renormalised'], x['resized']) for name, x in found['teachers'].items()} == {
        'clip': (11, True, False), 'mae': (10, False, False)}


def test_plan__memory_of_weights_and_optimizer():
    found = plan(load(HYBRID))
    trained, memory = 85_798_656 + 768 * 769, found['memory']
    assert memory['weights'] == memory['gradients'] == memory['buckets'] == 4 * trained
    # Two copies in float32, and a step counter for each of 12 x 12 + 6 + 2 tensors.
    assert memory['optimizer'] == 8 * trained + 4 * 152
    assert memory['teachers'] == 4 * (2 * 85_798_656 + 768)
    assert memory['images'] == 256 * 3 * 224 * 224 * 4
    # Under autocast the weights of linear layers, and of the patch embedding, are kept in 16 bits, and their biases.
    assert memory['half_weights'] == pytest.approx(2 * trained, rel=0.01)
    assert found['time']['gpus'] == 8
    alone = plan(tiny_config(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))))['memory']
    assert alone['optimizer'] == alone['gradients'] == alone['weights']
    assert alone['buckets'] == alone['half_weights'] == 0


@pytest.mark.parametrize('precision, each', [('OptimWrapper', 64), ('mmhdistill.auto_amp_optim_wrapper', 36)])
def test_plan__memory_of_the_student(precision, each):
    """A block keeps, of every token, the inputs of two norms, of four linear layers and of the activation, and its
    queries, keys and values: 16 x width numbers, of which under autocast the norms' alone are float32."""
    memory = plan(load('configs/baselines/fd_vit-b_clip_300e.py', optim_wrapper__type=precision))['memory']
    assert memory['tokens'] == 197 * 12
    assert memory['bytes_per_value'] == pytest.approx(each, rel=0.03)
    assert memory['student'] == pytest.approx(256 * 197 * 12 * 768 * each, rel=0.03)


@pytest.mark.parametrize('name', DISTILLERS)
def test_plan__flops_are_those_that_torch_counts(name):
    settings = DISTILLERS[name]
    found = plan(tiny_config(**settings))['flops']['this']
    model = build_distiller(**settings).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model.loss(random_images(1)).values()).backward()
    # The patch embedding needs no gradient of the images. Scores of tokens are left out of a plan: the class token's
    # queries times keys, of 17, 12 and 9 tokens.
    scores = 2 * 32 * (17 + 12 + 9) if name == 'class attention' else 0
    assert found['total'] == counter.get_total_flops() + stem(32, 16, 8) - scores


def test_plan__naive_way_of_a_masked_reconstruction():
    """Where nothing is dropped there is nothing to reconstruct: its loss costs what it costs."""
    found = plan(tiny_config(**DISTILLERS['decoder']))
    this, naive = found['flops']['this'], found['flops']['naive']
    assert naive['losses'] == this['losses']
    assert naive['student_forward'] > this['student_forward']
    # The student sees 4 of 16 patches, and the others are predicted.
    assert (found['masker']['counts'], found['losses']['masked']['tokens']) == ([4], [12])


def test_plan__teachers_with_grids_of_their_own():
    found = plan(tiny_config(**DISTILLERS['grids of the teachers']))
    clip, mae = found['teachers']['clip'], found['teachers']['mae']
    assert (clip['grid'], clip['image_size'], clip['resized'], clip['renormalised']) == ([6, 6], [48, 48], True, True)
    assert (mae['grid'], mae['resized'], mae['renormalised']) == ([5, 5], True, False)
    assert found['losses']['feature']['tokens'] == [36]
    assert set(found['losses']['relation']['tokens']) == {25}
    text = as_text(found)
    assert 'at 36 patches (resampled from 4x4 to 6x6)' in ' '.join(text.split())
    assert 're-normalised to mean 100.00 110.00 120.00' in text


def test_plan__tokens_that_the_student_drops_as_it_goes():
    found = plan(tiny_config(**DISTILLERS['encoder masking']))
    assert found['masker']['counts'] == found['masker']['kept_by_layer'] == [16, 10, 6]
    assert found['losses']['feature']['tokens'] == [6]
    assert 'of the student layers 0 to 0 see 16, layers 1 to 1 see 10' in ' '.join(as_text(found).split())


def test_plan__masked_teacher():
    found = plan(tiny_config(**DISTILLERS['masked teacher']))
    mae = stem(32, 16, 8) + 2 * 5 * 2 * 32**2
    assert found['teachers']['mae']['masked']
    blocks = found['teachers']['mae']['deepest_layer']
    assert found['flops']['this']['teachers']['mae'] == mae + blocks * block(32, 5)
    assert found['flops']['naive']['teachers']['mae'] == stem(32, 16, 8) + 3 * block(32, 17)


@pytest.mark.parametrize('pipeline, size', [
    ([dict(type='RandomResizedCrop', scale=48)], [48, 48]),
    ([dict(type='Resize', scale=(64, 40))], [40, 64]),  # mmcv's (width, height)
    ([dict(type='ResizeEdge', scale=64), dict(type='CenterCrop', crop_size=56)], [56, 56]),
])
def test_plan__image_size_is_what_the_pipeline_makes(pipeline, size):
    found = plan(tiny_config(pipeline))
    assert found['student']['image_size'] == size
    assert found['student']['grid'] == [side // 8 for side in size]
    assert found['notes'] == []
    patches = size[0] * size[1] // 64
    assert found['masker']['counts'][0] == int(patches * 0.8 + 0.5)


@pytest.mark.parametrize('transform, reason', [
    (dict(type='RandomFlip', prob=0.5), 'the training pipeline leaves images as large as they are'),
    (dict(type='LoadAnnotations'), "the training pipeline needs the data (KeyError: 'instances')"),
])
def test_plan__image_size_that_can_only_be_supposed(transform, reason):
    found = plan(tiny_config([transform]))
    assert found['student']['image_size'] == [32, 32]
    assert found['notes'] == [f'images of 32x32 px, as the student is built for, are supposed: {reason}']


def test_plan__keep_rate_that_falls():
    hook = dict(type='mmhdistill.RedundantTokenMasker', keep_rate=0.5, schedule='linear', begin=1, end=3)
    masker = dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.9, scorer=RANDOM)
    settings = dict(masker=masker, train_cfg=dict(max_epochs=4))
    found = plan(tiny_config(**settings, custom_hooks=[hook]), images=400)
    alike = {rate: plan(tiny_config(**{**settings, 'masker': {**masker, 'keep_rate': rate}})) for rate in (1.0, 0.5)}
    assert found['masker']['keep_rate_range'] == [0.5, 1.0]
    assert found['masker']['counts'] == [8]
    assert found['losses']['feature']['tokens'] == [8]
    # The most is needed at its start.
    assert found['memory'] == alike[1.0]['memory']
    # A quarter of the time all tokens, half of it fewer and fewer, a quarter of it the half.
    high, low = (alike[rate]['flops']['this']['student_forward'] for rate in (1.0, 0.5))
    assert found['flops']['this']['student_forward'] == pytest.approx((high + low) / 2, rel=0.01)
    assert 'mean over training' in as_text(found)
    assert 'keep rate 0.5 at the end (0.5 to 1) a stage' in as_text(found)


def test_plan__student_that_ends_early():
    relation = dict(type='mmhdistill.TokenRelationLoss', teacher='mae', layers=[(1, 2)])
    found = plan(tiny_config(losses=dict(relation=relation)))
    assert found['student']['deepest_layer'] == 1
    assert list(found['teachers']) == ['mae']
    assert found['notes'] == ["no loss reads teachers ['clip']: they are neither built, loaded nor run"]
    linear = 4 * 32**2 + 4 * 32 + 2 * 32 * 64 + 96
    block_size, norm = linear + 2 * 64, 2 * 32
    # Of layer 1 all but its queries, keys, values and first norm; all of layer 2; the final norm.
    assert found['parameters']['frozen'] == block_size + norm + block_size - norm - (3 * 32**2 + 3 * 32)


def test_plan__where_weights_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path))
    mine, url = tmp_path / 'mine.pth', 'https://example.org/mae.pth'
    cfg = tiny_config(backbone=tiny_student(init_from=dict(card=dict(
        tiny_teacher(name='start')['card'], mlp_ratio=2), checkpoint=str(mine))))
    cfg.model.teachers.mae.update(card=dict(cfg.model.teachers.mae.card, url=url), checkpoint='auto')
    found = plan(cfg)
    assert found['teachers']['mae']['weights'] == f'to be fetched from {url}'
    assert found['teachers']['clip']['weights'] == 'random weights'
    assert found['student']['starts_from'] == f'{mine}, not there yet'
    for path in (mine, tmp_path / 'mae.pth'):
        path.touch()
    found = plan(cfg)
    assert found['teachers']['mae']['weights'] == f'{tmp_path}/mae.pth, there'
    assert found['student']['starts_from'] == f'{mine}, there'
    assert found['teachers']['mae']['bytes'] == 4 * found['parameters']['teachers']['mae']
    assert f'starts from {mine}, there' in as_text(found)
    assert plan(tiny_config())['student']['starts_from'] == 'random weights'


WRONG = {
    'layer': (dict(losses=dict(relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae', layers=[(2, 3)]))),
              'layer 3 is out of range for the teacher, which has 3 layers'),
    'heads': (dict(backbone=tiny_student(
        arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64))),
              'the student has 2 heads and the teacher 4: set relation_heads'),
    'relation heads': (dict(losses=dict(relation=dict(
        type='mmhdistill.TokenRelationLoss', teacher='mae', relation_heads=5))), 'relation_heads=5 does not divide'),
    'keep rate': (dict(masker=dict(type='mmhdistill.ProgressiveTokenMasker', keep_rate=1.5, teacher='mae')),
                  r'the keep rate must lie in \(0, 1\], got 1.5'),
    'grid of the scoring teacher': (dict(teachers=dict(
        clip=tiny_teacher(name='clip'), mae=dict(tiny_teacher(name='mae'), image_size=48))),
        "scores the tokens of the student's 4x4 patches, but sees a grid of its own, 6x6"),
    'size of a teacher': (dict(masker=None, teachers=dict(
        clip=tiny_teacher(name='clip'), mae=dict(tiny_teacher(name='mae'), image_size=50))),
        'cannot cut images of 50x50 px into patches of 8 px'),
    'dropped tokens resampled': (dict(teachers=dict(
        clip=dict(tiny_teacher(name='clip'), image_size=48), mae=tiny_teacher(name='mae'))),
        'tokens were dropped, so a grid of 4x4 patches cannot be resampled'),
    'patches': (dict(backbone=tiny_student(patch_size=12, img_size=36)),
                'images of 32x32 pixels cannot be cut into patches of 12x12'),
    'nothing dropped': (dict(masker=None, losses=dict(masked=dict(
        type='mmhdistill.MaskedFeatureLoss', teacher='clip'))), 'and it saw all of them: give the model a masker'),
    'start': (dict(backbone=tiny_student(init_from=dict(card='mae-vit-b-p16'))),
              "the student cannot start from 'mae-vit-b-p16', a ViT of another architecture"),
}


@pytest.mark.parametrize('name', WRONG)
def test_plan__refuses_what_the_model_refuses(name):
    settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as planned:
        plan(tiny_config(**settings))
    with pytest.raises(ValueError, match=message) as trained:
        model = MODELS.build(tiny_distiller(**settings))
        model.init_weights()
        model.loss(random_images())
    assert str(planned.value) == str(trained.value)


@pytest.mark.parametrize('settings, message', [
    (dict(param_scheduler=[dict(type='CosineAnnealingLR', begin=5)]), 'CosineAnnealingLR of param_scheduler begins at'),
    (dict(masker=None, custom_hooks=[dict(type='mmhdistill.RedundantTokenMasker', keep_rate=0.5)]),
     'HybridDistiller has no masker: give the model one, or remove the hook'),
    (dict(custom_hooks=[dict(type='mmhdistill.RedundantTokenMasker', keep_rate=0)]), 'must lie in .*, got 0'),
    (dict(optim_wrapper=None), 'tiny.py lacks optim_wrapper'),
    (dict(model=None), 'tiny.py has no model, and only a distiller'),
])
def test_plan__refuses_what_training_refuses(settings, message):
    cfg = tiny_config(**settings)
    for key in [key for key, value in settings.items() if value is None and key != 'masker']:
        cfg.pop(key)
    with pytest.raises(ValueError, match=message):
        plan(cfg)
