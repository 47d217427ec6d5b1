import copy
import itertools

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.structures import BaseDataElement
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.registry import MODELS as MMPRETRAIN

from mmhdistill.functional import feature_distance, relation_kl, whiten
from mmhdistill.registry import MODELS
from tests.helpers import (
    assert_unchanged,
    build_distiller,
    log_messages,
    random_images,
    snapshot,
    tiny_distiller,
    tiny_student,
    tiny_teacher,
    without_gradient,
)

FEATURE = dict(type='mmhdistill.FeatureLoss', teacher='clip')
RELATION = dict(type='mmhdistill.TokenRelationLoss', teacher='mae')
INPUT = dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.8, teacher='mae')
ENCODER = dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder', keep_rate=0.7)
SETTINGS = {
    'both': dict(),
    'feature only': dict(losses=dict(feature=FEATURE), masker={**INPUT, 'teacher': 'clip'}),
    'relation only': dict(losses=dict(relation=RELATION)),
    'relation only, no masking': dict(losses=dict(relation=RELATION), masker=None),
    'relation of values only': dict(losses=dict(relation={**RELATION, 'kinds': ['vv'], 'layers': [(1, 2)]})),
    'encoder masking': dict(masker=ENCODER),
    'encoder masking, relation only': dict(losses=dict(relation=RELATION), masker=ENCODER),
    'encoder masking, relation of a shallow layer':
    dict(losses=dict(relation={**RELATION, 'layers': [(0, 0)]}), masker=ENCODER),
    'encoder masking, relation before the last stage':
    dict(losses=dict(relation={**RELATION, 'layers': [(1, 1)]}), masker=ENCODER),
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


def loss_of(model, images):
    return sum(model(images, mode='loss').values())


def train(model, steps=20):
    wrapper = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1)))
    losses = []
    for step in range(steps):
        losses.append(loss_of(model, random_images(seed=step)))
        wrapper.update_params(losses[-1])
    return losses


def everything(model):
    """Parameters and buffers of model and teachers, by owner."""
    for module in (model, *model.teachers.values()):
        yield from itertools.chain(module.parameters(), module.buffers())


def test_loss__keys_and_values_by_hand():
    model = build_distiller(masker=None, backbone=tiny_student(out_type='raw'))
    images = random_images()
    losses = model(images, mode='loss')
    assert list(losses) == ['loss/feature', 'loss/relation']

    clip, mae = model.teachers['clip'], model.teachers['mae']
    # The student's images, as the clip-like teacher normalises them.
    theirs = clip.vit(images * clip.scale + clip.shift)[0][:, 1:]
    ours = model.backbone(images)[0][:, 1:]
    expected = feature_distance(model.losses['feature'].projector(ours), whiten(theirs), 'smooth_l1', 2.0)
    torch.testing.assert_close(losses['loss/feature'], expected, rtol=1e-5, atol=0)

    # Layers 8, 9, 10 of 12 are layers 1 of 3, all at the same place.
    taps = {1: frozenset('qk')}
    student, teacher = model.backbone.encode(images, taps), mae(images, (4, 4), taps)
    tokens = [output.patches(1, kind) for output in (student, teacher) for kind in 'qk']
    torch.testing.assert_close(losses['loss/relation'], relation_kl(*tokens, heads=4), rtol=1e-5, atol=0)


def test_loss__weights_scale_their_loss():
    plain = build_distiller()(random_images(), mode='loss')
    weighted = build_distiller(
        losses=dict(feature={**FEATURE, 'loss_weight': 0.5}, relation={**RELATION, 'loss_weight': 3.0}))
    weighted = weighted(random_images(), mode='loss')
    torch.testing.assert_close(weighted['loss/feature'], plain['loss/feature'] * 0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(weighted['loss/relation'], plain['loss/relation'] * 3, rtol=1e-6, atol=0)


def test_loss__is_named_as_in_the_config():
    model = build_distiller(losses=dict(diversity=RELATION, again={**RELATION, 'kinds': ['vv']}))
    losses = model(random_images(), mode='loss')
    assert list(losses) == ['loss/diversity', 'loss/again']
    assert all(torch.isfinite(x) and x > 0 for x in losses.values())
    total, logged = model.parse_losses(losses)
    torch.testing.assert_close(total, losses['loss/diversity'] + losses['loss/again'])
    assert set(logged) == {'loss', 'loss/diversity', 'loss/again'}


@pytest.mark.parametrize('off', [None, {**FEATURE, 'loss_weight': 0}, {**FEATURE, 'loss_weight': 0.0}])
def test_init__loss_switched_off_is_not_built_nor_its_teacher(off):
    # A checkpoint that does not exist: it would fail if the teacher were built and loaded.
    teachers = dict(clip={**tiny_teacher(), 'checkpoint': '/nowhere.pth'}, mae=tiny_teacher())
    model = build_distiller(teachers=teachers, losses=dict(feature=off, relation=RELATION))
    assert list(model.losses) == ['relation']
    assert list(model.teachers) == ['mae']
    losses = model(random_images(), mode='loss')
    assert list(losses) == ['loss/relation']
    alone = build_distiller(losses=dict(relation=RELATION))(random_images(), mode='loss')
    assert torch.equal(losses['loss/relation'], alone['loss/relation'])


def test_init__option_of_a_misspelt_loss():
    with pytest.raises(ValueError, match=r"loss 'featur' has no type, .* the losses of this config are \['relation'\]"):
        build_distiller(losses=dict(featur=dict(loss_weight=0), relation=RELATION))


def test_init__every_loss_switched_off():
    with pytest.raises(ValueError, match='every loss is None or has weight 0'):
        build_distiller(losses=dict(feature=None, relation={**RELATION, 'loss_weight': 0}))


def test_init__masker_with_a_teacher_that_is_switched_off():
    with pytest.raises(ValueError, match=r"scores tokens with teacher 'mae', which is switched off because no loss "
                                         r"with a weight reads it: set masker\.teacher to one of \['clip'\]"):
        build_distiller(losses=dict(feature=FEATURE, relation={**RELATION, 'loss_weight': 0.0}))


def test_init__masker_with_an_unknown_teacher():
    with pytest.raises(ValueError, match=r"with teacher 'dino', which is not there: set masker\.teacher to one of "
                                         r"\['clip', 'mae'\]"):
        build_distiller(masker={**INPUT, 'teacher': 'dino'})


@pytest.mark.parametrize('name', ['dino', None])
def test_init__loss_with_an_unknown_teacher(name):
    with pytest.raises(ValueError, match=rf"loss 'feature' reads teacher {name!r}, which is not there: the teachers "
                                         r"are \['clip', 'mae'\]"):
        build_distiller(losses=dict(feature={**FEATURE, 'teacher': name}, relation=RELATION))


def test_init__loss_with_a_teacher_set_to_none():
    with pytest.raises(ValueError, match=r"loss 'feature' reads teacher 'clip', .* the teachers are \['mae'\]"):
        build_distiller(teachers=dict(clip=None, mae=tiny_teacher()))


@pytest.mark.parametrize('preprocessor', [None, dict(type='ImgDataPreprocessor')])
def test_init__preprocessor_without_mean(preprocessor):
    with pytest.raises(ValueError, match='does not normalise images, so teachers cannot tell what they are fed: give '
                                         'data_preprocessor a mean and std in 0-255'):
        build_distiller(data_preprocessor=preprocessor)


def test_init__preprocessor_in_the_message_can_be_built():
    with pytest.raises(ValueError) as caught:
        build_distiller(data_preprocessor=None)
    name = str(caught.value).split("dict(type='")[1].split("'")[0]
    preprocessor = MODELS.build(dict(type=name, mean=[10.0, 20.0, 30.0], std=[1.0, 2.0, 4.0]))
    assert preprocessor.mean.flatten().tolist() == [10, 20, 30]


def test_init__teachers_are_fed_with_the_students_normalisation():
    model = build_distiller()
    assert model.teachers['clip'].scale.flatten().tolist() == pytest.approx([58.395 / 60, 57.12 / 70, 57.375 / 80])
    assert model.teachers['clip'].shift.flatten().tolist() == pytest.approx([23.675 / 60, 6.28 / 70, -16.47 / 80])
    assert not model.teachers['mae']._renormalises


@pytest.mark.parametrize('number', [1, 3])
def test_init__any_number_of_teachers(number):
    teachers = {f't{index}': tiny_teacher(embed_dims=32 + 16 * index) for index in range(number)}
    losses = {f'l{index}': {**FEATURE, 'teacher': f't{index}'} for index in range(number)}
    model = build_distiller(teachers=teachers, losses=losses, masker={**INPUT, 'teacher': f't{number - 1}'})
    found = model(random_images(), mode='loss')
    assert list(found) == [f'loss/l{index}' for index in range(number)]
    assert all(torch.isfinite(x) for x in found.values())
    assert len({x.item() for x in found.values()}) == number
    sum(found.values()).backward()
    assert without_gradient(model) == []


def test_init__two_losses_share_one_teacher():
    model = build_distiller(losses=dict(feature={**FEATURE, 'teacher': 'mae'}, relation=RELATION))
    runs = []
    model.teachers['mae'].vit.layers[0].register_forward_hook(lambda *_: runs.append(1))
    assert torch.isfinite(loss_of(model, random_images()))
    assert (list(model.teachers), len(runs)) == (['mae'], 1)


def test_teachers__unchanged_to_the_bit_by_training(setting):
    model = build_distiller(**setting)
    before = {name: snapshot(teacher) for name, teacher in model.teachers.items()}
    student = snapshot(model)
    losses = train(model)
    assert all(torch.isfinite(loss) for loss in losses)
    for name, teacher in model.teachers.items():
        # 42 tensors of a ViT (pre-norm adds two and drops a bias), scale and shift.
        assert len(before[name]) == 45 - (name == 'mae')
        assert_unchanged(teacher, before[name])
        assert all(p.grad is None for p in teacher.parameters())
    moved = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, student[name])]
    assert moved == []


def test_teachers__outside_state_dict_parameters_and_optimizer():
    model = build_distiller()
    theirs = {id(x) for teacher in model.teachers.values() for x in teacher.parameters()}
    assert len(theirs) == 85
    assert [name for name in model.state_dict() if not name.startswith(('backbone.', 'losses.'))] == []
    # The student, which is as large as its teacher, and the projector's weight and bias.
    assert len(model.state_dict()) == 42 + 2
    assert theirs.isdisjoint(id(p) for p in model.parameters())
    assert [name for name, _ in model.named_modules() if 'teacher' in name] == []
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3)))
    optimised = [id(p) for group in wrapper.optimizer.param_groups for p in group['params']]
    assert len(optimised) == 44
    assert theirs.isdisjoint(optimised)


def test_teachers__shared_by_deepcopy():
    model = build_distiller()
    twin = copy.deepcopy(model)
    assert all(twin.teachers[name] is teacher for name, teacher in model.teachers.items())
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in model.parameters())
    images = random_images()
    assert torch.equal(loss_of(twin, images), loss_of(model, images))


def test_teachers__shared_by_the_ema_copy():
    model = build_distiller()
    ema = ExponentialMovingAverage(model)
    assert all(ema.module.teachers[name] is teacher for name, teacher in model.teachers.items())
    assert [x.shape for x in ema.module.parameters()] == [x.shape for x in model.parameters()]
    # Student, projector and the counter of steps.
    assert len(ema.state_dict()) == 44 + 1
    train(model, 1)
    ema.update_parameters(model)
    ema.update_parameters(model)
    assert all(torch.isfinite(x).all() for x in ema.module.parameters())


def test_teachers__shared_by_the_ema_hook():
    class Runner:
        iter = 0

    runner = Runner()
    runner.model = build_distiller()
    hook = EMAHook()
    hook.before_run(runner)
    theirs = hook.ema_model.module.teachers
    assert all(theirs[name] is teacher for name, teacher in runner.model.teachers.items())
    assert sum(p.numel() for p in hook.ema_model.parameters()) == sum(p.numel() for p in runner.model.parameters())


@pytest.mark.parametrize('copied', [lambda model: ExponentialMovingAverage(model, device='meta'),
                                    lambda model: copy.deepcopy(model).half(),
                                    lambda model: copy.deepcopy(copy.deepcopy(model)).to('meta')])
def test_teachers__stay_where_they_are_when_a_copy_moves(copied):
    model = build_distiller()
    before = [snapshot(teacher) for teacher in model.teachers.values()]
    expected = loss_of(model, random_images())
    moved = copied(model)
    assert {(p.device.type, p.dtype) for p in moved.parameters()} != {('cpu', torch.float32)}
    for teacher, state in zip(model.teachers.values(), before):
        assert_unchanged(teacher, state)
    assert torch.equal(loss_of(model, random_images()), expected)


@pytest.mark.parametrize('device, dtype', [('meta', torch.float32), ('cpu', torch.float64)])
def test_apply__to_reaches_the_teachers(device, dtype):
    model = build_distiller().to(device=device, dtype=dtype)
    found = {(x.device.type, x.dtype) for x in everything(model) if x.is_floating_point()}
    assert found == {(device, dtype)}
    images = random_images().to(device, dtype)
    losses = model(images, mode='loss') if device == 'cpu' else {}
    assert all(loss.dtype == torch.float64 and torch.isfinite(loss) for loss in losses.values())


def test_apply__double_precision_agrees_with_single():
    single = build_distiller()(random_images(), mode='loss')
    double = build_distiller().double()(random_images().double(), mode='loss')
    for name, loss in single.items():
        assert loss.item() == pytest.approx(double[name].item(), rel=1e-4)


@pytest.mark.parametrize('place', ['input', 'encoder'])
def test_loss__relation_to_itself_is_zero_at_keep_rate_one(place):
    masker = {**(INPUT if place == 'input' else ENCODER), 'keep_rate': 1.0}
    student = tiny_student(arch=dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=128))
    model = build_distiller(backbone=student, losses=dict(relation={**RELATION, 'layers': [(0, 0), (1, 1), (2, 2)],
                                                  'kinds': ['qk', 'vv', 'qq', 'kk']}), masker=masker)
    assert model(random_images(), mode='loss')['loss/relation'] > 1e-3
    model.backbone.load_state_dict(model.teachers['mae'].vit.state_dict())
    assert model(random_images(), mode='loss')['loss/relation'].abs() < 1e-6
    # Fewer tokens than the teacher attended to: their relations differ after the first block.
    model.masker.keep_rate = 0.6
    assert model(random_images(), mode='loss')['loss/relation'] > 1e-3


@pytest.mark.parametrize('masker', [None, INPUT, ENCODER])
def test_loss__under_autocast_agrees_with_single(masker):
    model = build_distiller(masker=masker)
    loss_of(model, random_images()).backward()
    single = {name: p.grad.flatten() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16):
        mixed = model(random_images(), mode='loss')
    assert {loss.dtype for loss in mixed.values()} == {torch.float32}
    for name, loss in model(random_images(), mode='loss').items():
        assert mixed[name].item() == pytest.approx(loss.item(), rel=0.02)
    sum(mixed.values()).backward()
    ours, theirs = (torch.cat(parts) for parts in ([p.grad.flatten() for p in model.parameters()], [*single.values()]))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999


@pytest.mark.parametrize('method, dtype', [('half', torch.float16), ('bfloat16', torch.bfloat16)])
def test_apply__half_reaches_the_teachers(method, dtype):
    model = getattr(build_distiller(), method)()
    assert {x.dtype for x in everything(model) if x.is_floating_point()} == {dtype}
    losses = model(random_images().to(dtype), mode='loss')
    single = build_distiller()(random_images(), mode='loss')
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(single[name].item(), rel=0.02)


def test_freeze_unused__no_trainable_parameter_lacks_a_gradient(setting):
    model = build_distiller(**setting)
    loss_of(model, random_images()).backward()
    assert without_gradient(model) == []
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert [name for name in frozen if model.get_parameter(name).grad is not None] == []


def test_freeze_unused__nothing_deeper_than_the_losses_is_run(setting):
    model = build_distiller(**setting)
    ran = set()
    for index, layer in enumerate(model.backbone.layers):
        layer.attn.qkv.register_forward_hook(lambda *_, index=index: ran.add(index))
        layer.ln1.register_forward_hook(lambda *_, index=index: ran.add(index))
    loss_of(model, random_images()).backward()
    used = {index for index, layer in enumerate(model.backbone.layers) if layer.attn.qkv.weight.grad is not None}
    assert ran == used == set(range(max(used) + 1))


def test_freeze_unused__both_losses_freeze_nothing():
    with log_messages() as messages:
        model = MODELS.build(tiny_distiller())
    assert all(p.requires_grad for p in model.parameters())
    assert messages == []


def test_freeze_unused__relation_only_freezes_the_end_and_names_it():
    with log_messages() as messages:
        model = MODELS.build(tiny_distiller(losses=dict(relation=RELATION)))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    # Relations at layer 1 of 0, 1, 2: its projection, second norm and MLP (8), layer 2 (12), the final norm (2).
    assert len(frozen) == 22
    assert [name for name in frozen if name.startswith('backbone.layers.1')] == [
        f'backbone.layers.1.{name}' for name in (
            'attn.proj.weight', 'attn.proj.bias', 'ln2.weight', 'ln2.bias', 'ffn.layers.0.0.weight',
            'ffn.layers.0.0.bias', 'ffn.layers.1.weight', 'ffn.layers.1.bias')]
    message, = (message for message in messages if 'student' in message)
    assert message.startswith('22 student tensors get no gradient from these losses and are frozen: ')
    assert message.split(': ')[1].split(', ') == [name.removeprefix('backbone.') for name in frozen]


def test_forward__same_seed_same_loss():
    masker = dict(type='mmhdistill.ProgressiveTokenMasker', scorer=dict(type='mmhdistill.RandomScorer'))
    setting = dict(masker=masker, backbone=tiny_student(drop_path_rate=0.5, drop_rate=0.1))
    runs = [[loss.item() for loss in train(build_distiller(seed, **setting), 3)] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(runs[0], runs[2]))


def test_forward__training_mode_leaves_the_teachers_still():
    model = build_distiller().train()
    assert model.training
    for teacher in model.teachers.values():
        assert [name for name, module in teacher.named_modules() if module.training] == []


def test_forward__unknown_mode():
    with pytest.raises(ValueError, match="unknown mode 'train': choose loss, predict or tensor"):
        build_distiller()(random_images(), mode='train')


def test_forward__tensor_mode_is_the_backbone():
    model = build_distiller()
    assert torch.equal(model(random_images())[0], model.backbone(random_images())[0])


def test_forward__images_that_cannot_be_cut_into_patches():
    with pytest.raises(ValueError, match='images of 36x36 pixels cannot be cut into patches of 8x8'):
        build_distiller()(random_images(size=36), mode='loss')


def test_forward__other_image_size():
    losses = build_distiller()(random_images(size=48), mode='loss')
    assert all(torch.isfinite(x) and x > 0 for x in losses.values())


def plain_vit(**kwargs):
    cfg = tiny_student(**kwargs)
    return {**cfg, 'type': 'VisionTransformer'}


def test_predict__mean_patch_token_of_the_plain_model():
    model = build_distiller()
    model.eval()
    vit = MMPRETRAIN.build(plain_vit(out_type='raw'))
    vit.load_state_dict(model.backbone.state_dict())
    vit.eval()
    raw = vit(random_images(3))[0]
    samples = [BaseDataElement(metainfo=dict(split='bank')) for _ in range(3)]
    found = model(random_images(3), samples, mode='predict')
    assert [sample.get('split') for sample in found] == ['bank'] * 3
    for index, sample in enumerate(found):
        torch.testing.assert_close(sample.feature, raw[index, 1:].mean(dim=0), rtol=0, atol=1e-6)
        torch.testing.assert_close(sample.cls_feature, raw[index, 0], rtol=0, atol=1e-6)
        assert not sample.feature.requires_grad


def test_predict__sees_the_full_image_also_with_a_masker():
    masked, plain = build_distiller(), build_distiller(masker=None)
    for model in (masked, plain):
        model.eval()
    a, b = (model(random_images(1), mode='predict')[0].feature for model in (masked, plain))
    assert torch.equal(a, b)


def test_predict__without_class_token():
    model = build_distiller(backbone=tiny_student(with_cls_token=False, out_type='raw'))
    model.eval()
    sample, = model(random_images(1), mode='predict')
    assert sample.keys() == ['feature']
    raw, = model.backbone(random_images(1))
    torch.testing.assert_close(sample.feature, raw[0].mean(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize('how', ['init_cfg', 'by hand'])
@pytest.mark.parametrize('out_type', ['raw', 'cls_token', 'featmap'])
def test_checkpoint__is_one_of_the_plain_vit(out_type, how, tmp_path):
    model = build_distiller()
    path = tmp_path / 'distilled.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    if how == 'init_cfg':
        vit = MMPRETRAIN.build(
            plain_vit(out_type=out_type, init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')))
        vit.init_weights()
    else:
        vit = MMPRETRAIN.build(plain_vit(out_type=out_type))
        state = torch.load(path, weights_only=True)['state_dict']
        state = {name.removeprefix('backbone.'): x for name, x in state.items() if name.startswith('backbone.')}
        vit.load_state_dict(state, strict=True)
    assert type(vit) is VisionTransformer
    model.eval()
    vit.eval()
    found, = vit(random_images())
    raw = model.backbone.encode(random_images(), {2: frozenset({'features'})}).taps[2, 'features']
    expected = dict(
        raw=raw, cls_token=raw[:, 0], featmap=raw[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))[out_type]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('setting', [dict(final_norm=False), dict(out_type='avg_featmap')])
def test_init__student_whose_checkpoint_would_not_fit(setting):
    with pytest.raises(ValueError, match='needs final_norm=True and out_type raw, cls_token or featmap'):
        build_distiller(backbone=tiny_student(**setting))


def test_init__teacher_without_a_type():
    teachers = tiny_distiller()['teachers']
    message = r"teacher 'mea' has no type, only \['checkpoint'\]: .* if one of \['clip', 'mae'\] is meant"
    with pytest.raises(ValueError, match=message):
        build_distiller(teachers={**teachers, 'mea': dict(checkpoint='mae.pth')})


def test_init__says_which_teachers_are_idle_and_which_random():
    with log_messages() as messages:
        build_distiller(losses=dict(relation=RELATION))
    told = [m for m in messages if 'teacher' in m]
    assert told[:2] == [
        "no loss reads teachers ['clip']: they are neither built nor loaded",
        "teacher 'mae' has random weights (checkpoint=None): good for trying things out only"
    ]
    assert len(told) == 3 and told[2].startswith("teacher 'mae': mae-like\n  file     random weights\n")
