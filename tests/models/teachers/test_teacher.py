import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ImgDataPreprocessor
from mmpretrain.registry import MODELS as MMPRETRAIN
from safetensors.torch import save_file
from torch import nn

from mmhdistill.models.teachers import CARDS, FrozenTeachers, ViTTeacher
from mmhdistill.registry import MODELS
from tests.helpers import (
    IMAGENET,
    OTHER,
    build_distiller,
    log_messages,
    random_images,
    randomise,
    spawn,
    tiny_card,
    tiny_distiller,
)

GRID = (4, 4)
FEATURES = {2: frozenset({'features'})}
STUDENT = dict(input_mean=IMAGENET['mean'], input_std=IMAGENET['std'])


def random_teacher(card=None, **kwargs):
    return randomise(ViTTeacher(card or tiny_card(), checkpoint=None, **kwargs))


def features(teacher, images, grid=GRID):
    return teacher(images, grid, FEATURES).taps[2, 'features']


@pytest.fixture(scope='module')
def photograph():
    """(512, 512, 3), RGB in 0-255, uint8."""
    from skimage import data
    return torch.from_numpy(data.astronaut())


def pixels_of(photograph, height=32, width=None):
    """Two parts of the photograph, (2, 3, height, width) uint8 in RGB."""
    width = width or height
    return torch.stack([photograph[top:top + height, 200:200 + width].permute(2, 0, 1) for top in (40, 260)])


def student_batch(pixels, mean, std):
    """What the student's data preprocessor makes of an image that was read as BGR."""
    preprocessor = ImgDataPreprocessor(mean=mean, std=std, bgr_to_rgb=True)
    return preprocessor(dict(inputs=pixels.flip(1)))['inputs']


def native(teacher, pixels, size=None):
    """The card's own model of mmpretrain, fed with ``pixels`` / 255, normalised as its authors write it."""
    vit = MMPRETRAIN.build(teacher.card.backbone())
    vit.load_state_dict(teacher.vit.state_dict())
    vit.eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) / 255 for x in (teacher.card.mean, teacher.card.std))
    images = (pixels.float() / 255 - mean) / std
    if size is not None:
        images = F.interpolate(images, size, mode='bicubic', antialias=True)
    with torch.no_grad():
        return vit(images)[0]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_train__stays_in_eval_mode_with_a_drop_path():
    teacher = random_teacher()
    for module in teacher.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.9
    assert sum(getattr(module, 'drop_prob', 0) == 0.9 for module in teacher.modules()) >= 3
    assert teacher.train() is teacher
    nn.ModuleList([teacher]).train()
    assert [name for name, module in teacher.named_modules() if module.training] == []
    first = features(teacher, random_images())
    assert torch.equal(first, features(teacher, random_images()))
    assert first.std() > 0.1


def test_init__nothing_is_trainable_and_outputs_carry_no_graph():
    teacher = random_teacher()
    assert len(list(teacher.parameters())) == 42
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == []
    out = features(teacher, random_images().requires_grad_())
    assert not out.requires_grad
    # Not an inference tensor: a loss may save it for backward.
    assert not out.is_inference()


def test_init__normalisation_is_not_part_of_the_weights():
    teacher = random_teacher(input_mean=OTHER['mean'], input_std=OTHER['std'])
    assert [name for name in teacher.state_dict() if not name.startswith('vit.')] == []


@pytest.mark.parametrize('student', [IMAGENET, OTHER, dict(mean=[0.0] * 3, std=[255.0] * 3),
                                     dict(mean=[127.5] * 3, std=[127.5] * 3)])
@pytest.mark.parametrize('card', [IMAGENET, OTHER])
def test_forward__renormalises_to_the_teacher(card, student, photograph):
    teacher = random_teacher(tiny_card(**card), input_mean=student['mean'], input_std=student['std'])
    pixels = pixels_of(photograph)
    assert relative(features(teacher, student_batch(pixels, **student)), native(teacher, pixels)) < 1e-5


def test_forward__a_published_file_of_timm_sees_what_timm_would_feed_it(photograph, tmp_path):
    import timm
    name = 'vit_small_patch16_224.augreg_in21k'
    model = randomise(timm.create_model(name, embed_dim=48, depth=3, num_heads=3, num_classes=5)).eval()
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    card = dataclasses.replace(CARDS['augreg-vit-s-p16-in21k'], embed_dims=48, depth=3, num_heads=3)
    teacher = ViTTeacher(card, checkpoint=str(tmp_path / 'model.safetensors'), **STUDENT)
    teacher.load()
    pixels = pixels_of(photograph, 224)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        expected = model.forward_features((pixels.float() / 255 - mean) / std)
        other = model.forward_features(student_batch(pixels, **IMAGENET))
    found = features(teacher, student_batch(pixels, **IMAGENET), (14, 14))
    assert relative(found, expected) < 1e-5
    # Left as the student sees them, the images would give other features.
    assert relative(other, expected) > 0.01


def test_forward__same_normalisation_leaves_the_images_untouched():
    teacher = random_teacher(**STUDENT)
    teacher.scale.fill_(float('nan'))
    assert torch.isfinite(features(teacher, random_images())).all()


@pytest.mark.parametrize('given', [dict(input_mean=OTHER['mean']), dict(input_std=OTHER['std'])])
def test_forward__renormalises_where_only_one_of_mean_and_std_differs(given, photograph):
    teacher = random_teacher(**{**STUDENT, **given})
    pixels = pixels_of(photograph)
    batch = student_batch(pixels, mean=given.get('input_mean', IMAGENET['mean']),
                          std=given.get('input_std', IMAGENET['std']))
    assert relative(features(teacher, batch), native(teacher, pixels)) < 1e-5


def test_forward__fed_with_another_normalisation_the_teacher_sees_other_images(photograph):
    pixels = pixels_of(photograph)
    teacher = random_teacher(input_mean=OTHER['mean'], input_std=OTHER['std'])
    wrong = features(teacher, student_batch(pixels, **IMAGENET))
    assert relative(wrong, native(teacher, pixels)) > 0.01


def test_forward__patches_of_14_beside_a_student_of_16(photograph):
    # As trained at 224 px, the 14 x 14 grid of the student leaves 196 px to patches of 14.
    teacher = random_teacher(tiny_card(patch_size=14, img_size=224, **OTHER), name='clip', **STUDENT)
    pixels = pixels_of(photograph, 224)
    with log_messages() as messages:
        for _ in range(2):
            output = teacher(student_batch(pixels, **IMAGENET), (14, 14), FEATURES)
    assert (output.grid, output.taps[2, 'features'].shape) == ((14, 14), (2, 1 + 196, 32))
    assert relative(output.taps[2, 'features'], native(teacher, pixels, (196, 196))) < 1e-5
    assert messages == [
        "teacher 'clip' sees images resized from (224, 224) to (196, 196), 14x14 patches of 14 px",
        "teacher 'clip' has its position embedding resampled from 16x16 to 14x14 patches (bicubic)",
    ]


@pytest.mark.parametrize('image_size, size', [(64, (64, 64)), ((32, 48), (32, 48)), ([48, 40], (48, 40))])
def test_forward__image_size_is_a_size_of_its_own(image_size, size, photograph):
    teacher = random_teacher(tiny_card(**OTHER), image_size=image_size, **STUDENT)
    pixels = pixels_of(photograph)
    output = teacher(student_batch(pixels, **IMAGENET), GRID, FEATURES)
    assert output.grid == teacher.grid(GRID) == (size[0] // 8, size[1] // 8)
    assert relative(output.taps[2, 'features'], native(teacher, pixels, size)) < 1e-5


def test_forward__image_size_of_the_images_resizes_nothing(photograph):
    teacher = random_teacher(image_size=48, **STUDENT)
    pixels = pixels_of(photograph, 48)
    with log_messages() as messages:
        # The student cuts them into patches of 4 px.
        output = teacher(student_batch(pixels, **IMAGENET), (12, 12), FEATURES)
    assert output.grid == (6, 6)
    assert relative(output.taps[2, 'features'], native(teacher, pixels)) < 1e-5
    assert [m for m in messages if 'resized' in m] == []


def test_grid__follows_the_student_unless_it_has_an_image_size():
    assert random_teacher().grid((3, 5)) == (3, 5)
    assert random_teacher(image_size=64).grid((3, 5)) == (8, 8)
    assert random_teacher(image_size=(16, 64)).grid((3, 5)) == (2, 8)


@pytest.mark.parametrize('image_size, named', [(36, '36x36'), ((32, 20), '32x20'), (0, '0x0'), (4, '4x4')])
def test_grid__image_size_that_cannot_be_cut_into_patches(image_size, named):
    teacher = random_teacher(image_size=image_size, name='mae')
    message = (f"teacher 'mae' cannot cut images of {named} px into patches of 8 px: give image_size multiples of 8.")
    # Before training, when the receipt is written, and whenever it is run.
    for use in (lambda: teacher.describe_run(GRID, FEATURES), lambda: features(teacher, random_images())):
        with pytest.raises(ValueError) as caught:
            use()
        assert str(caught.value) == message


def test_forward__oblong_grid(photograph):
    teacher = random_teacher(tiny_card(patch_size=4, img_size=16), **STUDENT)
    pixels = pixels_of(photograph, 16, 32)
    output = teacher(student_batch(pixels, **IMAGENET), (2, 4), FEATURES)
    assert output.grid == (2, 4)
    assert relative(output.taps[2, 'features'], native(teacher, pixels, (8, 16))) < 1e-5
    # Rows are not columns: turned, it is another image.
    turned = teacher(student_batch(pixels, **IMAGENET).mT, (4, 2), FEATURES)
    assert turned.grid == (4, 2)
    assert relative(turned.taps[2, 'features'].reshape(2, -1), output.taps[2, 'features'].reshape(2, -1)) > 0.01


def test_forward__position_notes_once_per_grid(photograph):
    teacher = random_teacher(name='mae', **STUDENT)
    with log_messages() as messages:
        for size in (48, 32, 48, 64, 48, 64, 32):
            pixels = pixels_of(photograph, size)
            ours = features(teacher, student_batch(pixels, **IMAGENET), (size // 8, size // 8))
            assert relative(ours, native(teacher, pixels)) < 1e-5
    assert messages == [f"teacher 'mae' has its position embedding resampled from 4x4 to {grid} patches (bicubic)"
                        for grid in ('6x6', '8x8')]


def test_forward__computed_positions_are_noted_as_such():
    teacher = random_teacher(tiny_card(resampling='sincos'), name='moco')
    with log_messages() as messages:
        features(teacher, random_images(size=48), (6, 6))
    assert messages == ["teacher 'moco' has its position embedding computed anew from 4x4 to 6x6 patches (sincos)"]


def test_forward__fitting_images_cause_no_note():
    with log_messages() as messages:
        features(random_teacher(), random_images())
    assert messages == []


def test_forward__runs_no_deeper_than_asked():
    teacher = random_teacher()
    calls = []
    for index, layer in enumerate(teacher.vit.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    teacher(random_images(), GRID, {1: frozenset({'hidden'})})
    assert calls == [0, 1]


def test_forward__without_class_token(photograph):
    teacher = random_teacher(tiny_card(class_token=False), **STUDENT)
    assert teacher.spec.num_extra_tokens == 0
    pixels = pixels_of(photograph)
    ours = features(teacher, student_batch(pixels, **IMAGENET))
    assert ours.shape == (2, 16, 32)
    assert relative(ours, native(teacher, pixels)) < 1e-5


@pytest.mark.parametrize('card, extra, has', [(dict(), 1, True), (dict(registers=4), 5, True),
                                              (dict(class_token=False), 0, False)])
def test_spec__extra_tokens_and_class_token(card, extra, has):
    spec = random_teacher(tiny_card(**card)).spec
    assert (spec.num_extra_tokens, spec.class_token, spec.has_class_token) == (extra, has, has)


@pytest.mark.parametrize('checkpoint', [None, 'no.pth'])
def test_load__warns_of_random_weights_once(checkpoint):
    teacher = ViTTeacher(tiny_card(), checkpoint=checkpoint, name='mae')
    with log_messages() as messages:
        for _ in range(3):
            if checkpoint:
                with pytest.raises(FileNotFoundError):
                    teacher.load()
            else:
                teacher.load()
    warning = "teacher 'mae' has random weights (checkpoint=None): good for trying things out only"
    assert messages == ([] if checkpoint else [warning])


def test_to__double_precision_agrees_with_single():
    teacher = random_teacher(tiny_card(**OTHER), **STUDENT)
    images = random_images(size=48)
    single = features(teacher, images, (6, 6))
    double = features(teacher.to(torch.float64), images.double(), (6, 6))
    assert double.dtype == torch.float64
    assert 0 < relative(single.double(), double) < 1e-5


def test_half__agrees_with_single():
    teacher = random_teacher(tiny_card(**OTHER), **STUDENT)
    images = random_images(size=48)
    single = features(teacher, images, (6, 6))
    half = features(teacher.half(), images.half(), (6, 6))
    assert half.dtype == torch.float16
    assert 1e-5 < relative(half.float(), single) < 0.02


def test_to__cached_positions_follow():
    teacher = random_teacher()
    features(teacher, random_images(size=48), (6, 6))
    assert teacher.double()._position((6, 6)).dtype == torch.float64
    assert teacher.to('meta')._position((6, 6)).device.type == 'meta'


def test_describe_run__grid_size_tokens_and_cost():
    teacher = random_teacher(tiny_card(patch_size=14, img_size=56, registers=4), image_size=(28, 70))
    run = teacher.describe_run((6, 6), {1: frozenset({'hidden'})})
    tokens, width = 1 + 4 + 2 * 5, 32
    block = 2 * tokens * (4 * width**2 + 2 * 4 * width**2) + 4 * tokens**2 * width
    assert run.pop('gflops') * 1e9 == pytest.approx(2 * 10 * 3 * 14**2 * width + 2 * block, rel=1e-9)
    assert run == dict(grid=[2, 5], image_size=[28, 70], extra_tokens='1 class + 4 register', deepest_layer=1, depth=3,
                       positions='resampled from 4x4 to 2x5 patches (bicubic)')


@pytest.mark.parametrize('kwargs, extra', [(dict(), '1 class'), (dict(class_token=False), 'none')])
def test_describe_run__as_trained(kwargs, extra):
    run = random_teacher(tiny_card(**kwargs)).describe_run(GRID, FEATURES)
    assert (run['positions'], run['extra_tokens'], run['image_size']) == ('as trained', extra, [32, 32])


def test_frozen_teachers__copies_share():
    teachers = FrozenTeachers(mae=random_teacher())
    for copied, owned in ((copy.copy(teachers), True), (copy.deepcopy(teachers), False)):
        assert copied['mae'] is teachers['mae']
        assert (copied.owned, teachers.owned) == (owned, True)


def test_frozen_teachers__a_copy_made_before_loading_shares_the_loaded_teacher(tmp_path):
    torch.save(random_teacher().vit.state_dict(), tmp_path / 'w.pth')
    model = MODELS.build(tiny_distiller(
        teachers=dict(mae=dict(type='mmhdistill.ViTTeacher', card=tiny_card(), checkpoint=str(tmp_path / 'w.pth'))),
        losses=dict(relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae'))))
    twin = copy.deepcopy(model)
    model.init_weights()
    twin.load_state_dict(model.state_dict())
    expected = model(random_images(), mode='loss')['loss/relation']
    assert expected > 1e-3
    assert torch.equal(twin(random_images(), mode='loss')['loss/relation'], expected)


def test_deepcopy__of_a_teacher_alone_is_a_copy():
    teacher = random_teacher()
    twin = copy.deepcopy(teacher)
    expected = features(teacher, random_images())
    for parameter in teacher.parameters():
        parameter.data.zero_()
    assert torch.equal(features(twin, random_images()), expected)


def test_distiller__half_precision_reaches_cached_positions():
    model = build_distiller()
    model(random_images(size=48), mode='loss')
    losses = model.double()(random_images(size=48).double(), mode='loss')
    assert {x.dtype for x in losses.values()} == {torch.float64}


def load_random(rank, folder):
    torch.manual_seed(rank)
    teacher = ViTTeacher(tiny_card(), checkpoint=None)
    drawn = teacher.vit.patch_embed.projection.weight.clone()
    teacher.load()
    torch.save(dict(drawn=drawn, weights=teacher.state_dict()), folder / f'{rank}.pth')


@pytest.mark.slow
def test_load__random_weights_are_the_same_in_all_processes(tmp_path):
    spawn(load_random, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1))
    assert not torch.equal(first['drawn'], second['drawn'])
    assert torch.equal(first['weights']['vit.patch_embed.projection.weight'], first['drawn'])
    assert len(first['weights']) > 30
    assert all(torch.equal(x, second['weights'][name]) for name, x in first['weights'].items())
