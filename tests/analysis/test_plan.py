"""What a plan says, against closed forms, against what torch counts, and against the models that it describes."""
import json
import math
import socket
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmhdistill.analysis.plan import plan
from mmhdistill.analysis.plan_text import as_text
from mmhdistill.analysis.rehearsal import Rehearsal, build_on_meta
from mmhdistill.registry import MODELS
from tests.helpers import (
    OTHER,
    build_distiller,
    random_images,
    tiny_distiller,
    tiny_student,
    tiny_teacher,
    write_images,
)

ROOT = Path(__file__).parents[2]
CONFIGS = [str(path.relative_to(ROOT)) for folder in ('hdistill', 'moma', 'baselines', 'quickstart')
           for path in sorted((ROOT / 'configs' / folder).glob('*.py'))]
HYBRID = 'configs/hdistill/vit-b_clip-mae_300e.py'
RANDOM = dict(type='mmhdistill.RandomScorer')


def load(name, **options):
    cfg = Config.fromfile(ROOT / name)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def tiny(pipeline=None, **settings):
    """A config of :func:`tiny_distiller`; settings of the model are those that it knows."""
    model = {key: settings.pop(key) for key in list(settings) if key in tiny_distiller()}
    pipeline = pipeline or [dict(type='Resize', scale=32)]
    return Config({
        **dict(
            default_scope='mmpretrain', model=tiny_distiller(**model),
            train_dataloader=dict(
                batch_size=4, drop_last=True, dataset=dict(
                    type='mmhdistill.ImageFolder', data_root='nowhere',
                    pipeline=[dict(type='LoadImageFromFile'), *pipeline, dict(type='PackInputs')])),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2)),
        **settings
    }, cfg_text='# none', filename='tiny.py')


def block(width, tokens):
    """FLOPs of a block with an MLP of four times the width."""
    return 2 * tokens * 12 * width**2 + 4 * tokens**2 * width


def stem(width, patches, patch_size):
    return 2 * patches * width * 3 * patch_size**2


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
    alone = plan(tiny(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))))['memory']
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


def kept_bytes(model, images, half):
    """Bytes that autograd really keeps of a step of a model on a CPU, parameters left out, and of teachers' outputs."""
    kept, known = {}, {x.untyped_storage().data_ptr() for x in [images, *model.parameters()]}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast(
            'cpu', dtype=torch.bfloat16, enabled=half):
        student, teachers = model.encode(images)
        losses = [loss(student, teachers[name]) for name, loss in model.losses.items()]
    assert all(loss.requires_grad for loss in losses)
    read = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for output in teachers.values() for x in output.taps.values()}
    return sum(storage.nbytes() for storage in kept.values()), sum(read.values())


DISTILLERS = {
    'input masking': dict(),
    'all tokens': dict(masker=None),
    'encoder masking': dict(masker=dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder', keep_rate=0.6)),
    'class attention': dict(masker=dict(
        type='mmhdistill.ProgressiveTokenMasker', teacher='mae', scorer=dict(type='mmhdistill.CLSAttentionScorer'))),
    'layer scale and gated MLP': dict(backbone=tiny_student(
        layer_scale_init_value=0.1, layer_cfgs=dict(ffn_type='swiglu_fused'), drop_path_rate=0.1)),
    'decoder': dict(
        losses=dict(masked=dict(type='mmhdistill.MaskedFeatureLoss', teacher='clip', decoder=dict(
            type='mmhdistill.MaskDecoder', embed_dims=32, depth=2, num_heads=4))),
        masker=dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.25, scorer=RANDOM)),
    'grids of the teachers': dict(
        masker=None, teachers=dict(clip=dict(tiny_teacher(name='clip', embed_dims=48, **OTHER), image_size=48),
                                   mae=dict(tiny_teacher(name='mae'), image_size=40))),
    'masked teacher': dict(
        masker=dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.25, scorer=RANDOM),
        teachers=dict(clip=tiny_teacher(name='clip'), mae=dict(tiny_teacher(name='mae'), masked=True))),
}


@pytest.mark.parametrize('half', [False, True], ids=['float32', 'autocast'])
@pytest.mark.parametrize('name', DISTILLERS)
def test_rehearsal__keeps_what_a_step_keeps(name, half):
    batch, settings = 5, DISTILLERS[name]
    model = build_distiller(**settings).train()
    saved, read = kept_bytes(model, random_images(batch), half)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        step = Rehearsal(build_on_meta(tiny(**settings)), (32, 32), half).step()
    assert batch * (step.student + step.losses) + step.fixed == pytest.approx(saved, rel=0.01)
    assert batch * step.teachers == read
    # Under autocast, weights in 16 bits.
    matrices = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim > 1)
    assert step.fixed == pytest.approx(2 * matrices * half, rel=0.1, abs=512)


@pytest.mark.parametrize('name', DISTILLERS)
def test_plan__flops_are_those_that_torch_counts(name):
    settings = DISTILLERS[name]
    found = plan(tiny(**settings))['flops']['this']
    model = build_distiller(**settings).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model.loss(random_images(1)).values()).backward()
    # The patch embedding needs no gradient of the images. Scores of tokens are left out of a plan: the class token's
    # queries times keys, of 17, 12 and 9 tokens.
    scores = 2 * 32 * (17 + 12 + 9) if name == 'class attention' else 0
    assert found['total'] == counter.get_total_flops() + stem(32, 16, 8) - scores


def test_plan__naive_way_of_a_masked_reconstruction():
    """Where nothing is dropped there is nothing to reconstruct: its loss costs what it costs."""
    found = plan(tiny(**DISTILLERS['decoder']))['flops']
    assert found['naive']['losses'] == found['this']['losses']
    assert found['naive']['student_forward'] > found['this']['student_forward']


def test_plan__teachers_with_grids_of_their_own():
    found = plan(tiny(**DISTILLERS['grids of the teachers']))
    clip, mae = found['teachers']['clip'], found['teachers']['mae']
    assert (clip['grid'], clip['image_size'], clip['resized'], clip['renormalised']) == ([6, 6], [48, 48], True, True)
    assert (mae['grid'], mae['resized'], mae['renormalised']) == ([5, 5], True, False)
    assert found['losses']['feature']['tokens'] == [36]
    assert set(found['losses']['relation']['tokens']) == {25}
    text = as_text(found)
    assert 'at 36 patches (resampled from 4x4 to 6x6)' in ' '.join(text.split())
    assert 're-normalised to mean 100.00 110.00 120.00' in text


def test_plan__tokens_that_the_student_drops_as_it_goes():
    found = plan(tiny(**DISTILLERS['encoder masking']))
    assert found['masker']['counts'] == found['masker']['kept_by_layer'] == [16, 10, 6]
    assert found['losses']['feature']['tokens'] == [6]
    assert 'of the student layers 0 to 0 see 16, layers 1 to 1 see 10' in ' '.join(as_text(found).split())


def test_plan__masked_teacher():
    found = plan(tiny(**DISTILLERS['masked teacher']))
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
    found = plan(tiny(pipeline))
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
    found = plan(tiny([transform]))
    assert found['student']['image_size'] == [32, 32]
    assert found['notes'] == [f'images of 32x32 px, as the student is built for, are supposed: {reason}']


def test_plan__keep_rate_that_falls():
    hook = dict(type='mmhdistill.RedundantTokenMasker', keep_rate=0.5, schedule='linear', begin=1, end=3)
    masker = dict(type='mmhdistill.ProgressiveTokenMasker', num_stages=1, keep_rate=0.9, scorer=RANDOM)
    settings = dict(masker=masker, train_cfg=dict(max_epochs=4))
    found = plan(tiny(**settings, custom_hooks=[hook]), images=400)
    alike = {rate: plan(tiny(**{**settings, 'masker': {**masker, 'keep_rate': rate}})) for rate in (1.0, 0.5)}
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
    found = plan(tiny(losses=dict(relation=relation)))
    assert found['student']['deepest_layer'] == 1
    assert list(found['teachers']) == ['mae']
    assert found['notes'] == ["no loss reads teachers ['clip']: they are neither built, loaded nor run"]
    linear = 4 * 32**2 + 4 * 32 + 2 * 32 * 64 + 96
    block_size, norm = linear + 2 * 64, 2 * 32
    # Of layer 1 all but its queries, keys, values and first norm; all of layer 2; the final norm.
    assert found['parameters']['frozen'] == block_size + norm + block_size - norm - (3 * 32**2 + 3 * 32)


def test_plan__teachers_without_weights_take_no_memory():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = build_on_meta(
            load('configs/hdistill/vit-l_clip-mae_300e.py', model__teachers__mae__checkpoint=None))
    large = [distiller.backbone, *distiller.teachers.values()]
    assert {p.device.type for model in large for p in model.parameters()} == {'meta'}


def test_plan__where_weights_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path))
    mine, url = tmp_path / 'mine.pth', 'https://example.org/mae.pth'
    cfg = tiny(backbone=tiny_student(init_from=dict(card=dict(
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
    assert plan(tiny())['student']['starts_from'] == 'random weights'


def test_plan__time():
    found = plan(load(HYBRID), tflops=150)
    time, total = found['time'], found['flops']['this']['total']
    assert (time['gpus'], time['batch'], time['accumulated'], time['images_per_step']) == (8, 256, 1, 2048)
    assert (time['images'], time['iterations_per_epoch'], time['iterations']) == (1_281_167, 625, 187_500)
    assert time['lr'] == 1.2e-3
    assert time['seconds'] == pytest.approx(187_500 * 256 * total / 150e12)
    assert time['images_per_second'] == pytest.approx(150e12 / total)


@pytest.mark.parametrize('drop_last, gpus, per_epoch', [(True, 1, 2), (False, 1, 3), (True, 2, 1), (False, 2, 2)])
def test_plan__images_of_a_folder(tmp_path, drop_last, gpus, per_epoch):
    write_images(tmp_path, [f'{index}.png' for index in range(10)], size=8)
    cfg = tiny(auto_scale_lr=dict(base_batch_size=8))
    cfg.train_dataloader.drop_last = drop_last
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    time = plan(cfg, gpus=gpus)['time']
    assert (time['images'], time['images_source']) == (10, f'counted in {tmp_path}')
    assert (time['iterations_per_epoch'], time['iterations']) == (per_epoch, 2 * per_epoch)


def test_plan__images_that_nobody_knows():
    found = plan(tiny())
    assert found['time']['iterations'] is found['time']['seconds'] is found['disk']['logs'] is None
    assert 'unknown number of images an epoch (nowhere is not there: give --images)' in as_text(found)


def test_plan__counted_in_iterations():
    cfg = tiny(train_cfg=dict(type='IterBasedTrainLoop', max_iters=1000),
               default_hooks=dict(logger=dict(interval=50), checkpoint=dict(interval=300, by_epoch=False)))
    found = plan(cfg)
    assert (found['time']['epochs'], found['time']['iterations']) == (None, 1000)
    assert found['disk']['checkpoints'] == 4  # 300, 600, 900 and the last
    assert found['disk']['logs'] == 20 * 812
    assert plan(cfg, images=40)['time']['epochs'] == 100


@pytest.mark.parametrize('hook, kept', [
    (dict(interval=1), 10), (dict(interval=1, max_keep_ckpts=3), 3), (dict(interval=4), 3), (dict(interval=5), 2),
    (dict(interval=4, save_last=False), 2), (dict(interval=100, max_keep_ckpts=1), 1), (None, 0),
])
def test_plan__checkpoints(hook, kept):
    cfg = tiny(train_cfg=dict(max_epochs=10), default_hooks=dict(checkpoint=hook))
    found = plan(cfg, images=40)
    assert found['disk']['checkpoints'] == kept
    trained = found['parameters']['trained'] + sum(found['parameters']['losses'].values())
    # Weights and two states of each, step counters, and what was logged of 100 iterations.
    assert found['disk']['checkpoint'] == pytest.approx(12 * trained + 166 * 100, rel=0.01)


@pytest.mark.parametrize('gpus, accumulated, scale, rate, note', [
    (None, 1, False, 1e-3, None), (4, 1, False, 1e-3, None), (None, 2, False, 1e-3, None), (2, 2, False, 1e-3, None),
    (2, 1, False, 1e-3, '8 images make a step, and the learning rate is made for 16: set'),
    (2, 1, True, 5e-4, None), (3, 1, True, 7.5e-4, None), (8, 2, True, 4e-3, None)])
def test_plan__learning_rate_is_made_for_a_batch(gpus, accumulated, scale, rate, note):
    cfg = tiny(auto_scale_lr=dict(base_batch_size=16))
    cfg.optim_wrapper.accumulative_counts = accumulated
    found = plan(cfg, gpus, auto_scale_lr=scale)
    if gpus is None:
        assert found['time']['gpus'] == 4 // accumulated
    assert found['time']['images_per_step'] == found['time']['gpus'] * 4 * accumulated
    assert found['time']['lr'] == pytest.approx(rate)
    assert [text[:len(note)] for text in found['notes']] == [note] if note else found['notes'] == []


def test_plan__batch_that_cannot_be_split():
    with pytest.raises(ValueError, match='2048 images a step, which cannot be split over 3 GPUs equally: take'):
        plan(tiny(auto_scale_lr=dict(base_batch_size=2048)), gpus=3)


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
        plan(tiny(**settings))
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
    cfg = tiny(**settings)
    for key in [key for key, value in settings.items() if value is None and key != 'masker']:
        cfg.pop(key)
    with pytest.raises(ValueError, match=message):
        plan(cfg)


@pytest.mark.parametrize('images, message', [(3, '3 images make no full batch of 4'), (0, '--images is 0')])
def test_plan__refuses_too_few_images(images, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny(), images=images)
