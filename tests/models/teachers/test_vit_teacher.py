import copy
import hashlib
import re

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS as MMPRETRAIN
from torch import nn

from mmhdistill.models.teachers import CARDS, FrozenTeachers, TeacherCard, ViTTeacher, find_card
from tests.helpers import (
    IMAGENET,
    OTHER,
    assert_unchanged,
    log_messages,
    random_images,
    randomise,
    snapshot,
    tiny_card,
)

GRID = (4, 4)
FEATURES = {2: frozenset({'features'})}


def random_teacher(card=None, **kwargs):
    return randomise(ViTTeacher(card or tiny_card(), checkpoint=None, **kwargs))


def features(teacher, images, grid=GRID):
    return teacher(images, grid, FEATURES).taps[2, 'features']


def native(teacher, pixels, size=None):
    """The card's own model, fed with its own normalisation of ``pixels`` in 0-255."""
    vit = MMPRETRAIN.build(teacher.card.backbone())
    vit.load_state_dict(teacher.vit.state_dict())
    vit.eval()
    images = normalise(pixels, teacher.card.mean, teacher.card.std)
    if size is not None:
        images = F.interpolate(images, size, mode='bicubic', antialias=True)
    with torch.no_grad():
        return vit(images)[0]


def normalise(pixels, mean, std):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return (pixels - mean) / std


def random_pixels(size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255


@pytest.fixture
def checkpoint(tmp_path):
    """A file that fits the tiny card, and its content."""
    state = random_teacher().vit.state_dict()
    torch.save(state, tmp_path / 'w.pth')
    return tmp_path / 'w.pth', state


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
def test_forward__renormalises_to_the_teacher(card, student):
    teacher = random_teacher(tiny_card(**card), input_mean=student['mean'], input_std=student['std'])
    pixels = random_pixels()
    ours = features(teacher, normalise(pixels, **student))
    torch.testing.assert_close(ours, native(teacher, pixels), rtol=0, atol=1e-5)


def test_forward__same_normalisation_leaves_the_images_untouched():
    teacher = random_teacher(input_mean=IMAGENET['mean'], input_std=IMAGENET['std'])
    teacher.scale.fill_(float('nan'))
    assert torch.isfinite(features(teacher, random_images())).all()


def test_forward__fed_with_another_normalisation_the_teacher_sees_other_images():
    pixels = random_pixels()
    teacher = random_teacher(input_mean=OTHER['mean'], input_std=OTHER['std'])
    wrong = features(teacher, normalise(pixels, **IMAGENET))
    assert (wrong - native(teacher, pixels)).abs().max() > 0.1


def test_forward__smaller_patches_see_a_smaller_image_of_the_same_grid():
    teacher = random_teacher(tiny_card(patch_size=7, img_size=28, **OTHER),
                             input_mean=IMAGENET['mean'], input_std=IMAGENET['std'])
    pixels = random_pixels()
    with log_messages() as messages:
        output = teacher(normalise(pixels, **IMAGENET), GRID, FEATURES)
        features(teacher, normalise(pixels, **IMAGENET))
    assert output.grid == GRID
    assert output.taps[2, 'features'].shape == (2, 17, 32)
    torch.testing.assert_close(
        output.taps[2, 'features'], native(teacher, pixels, (28, 28)), rtol=0, atol=1e-5)
    message, = messages
    assert "teacher 'teacher' sees images resized from (32, 32) to (28, 28)" in message
    assert "patches of 7 px make the student's 4x4 grid" in message


def test_forward__another_grid_resamples_the_position_embedding_and_says_so_once():
    teacher = random_teacher(name='mae')
    pixels = random_pixels(48)
    with log_messages() as messages:
        for _ in range(3):
            ours = features(teacher, normalise(pixels, **IMAGENET), (6, 6))
    torch.testing.assert_close(ours, native(teacher, pixels), rtol=0, atol=1e-5)
    assert messages == ["teacher 'mae' has its position embedding resampled from (4, 4) to (6, 6) patches (bicubic)"]


def test_forward__oblong_grid():
    teacher = random_teacher(tiny_card(patch_size=4, img_size=16))
    images = random_images(2, 32)[:, :, :16]
    output = teacher(images, (2, 4), FEATURES)
    assert output.grid == (2, 4)
    vit_images = F.interpolate(images, (8, 16), mode='bicubic', antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(output.taps[2, 'features'], teacher.vit(vit_images)[0], rtol=0, atol=1e-5)


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


def test_forward__without_class_token():
    teacher = random_teacher(tiny_card(class_token=False))
    assert teacher.spec.num_extra_tokens == 0
    pixels = random_pixels()
    ours = features(teacher, normalise(pixels, **IMAGENET))
    assert ours.shape == (2, 16, 32)
    torch.testing.assert_close(ours, native(teacher, pixels), rtol=0, atol=1e-5)


def test_forward__before_loading(checkpoint):
    teacher = ViTTeacher(tiny_card(), checkpoint=str(checkpoint[0]), name='mae')
    with pytest.raises(RuntimeError, match=r"teacher 'mae' has no weights yet: call init_weights\(\)"):
        features(teacher, random_images())


@pytest.mark.parametrize('licence, named', [('', ''), ('CC-BY-NC-4.0', ', licence CC-BY-NC-4.0')])
def test_load__receipt(licence, named, checkpoint):
    path, state = checkpoint
    teacher = ViTTeacher(tiny_card(licence=licence), checkpoint=str(path), name='mae')
    with log_messages() as messages:
        teacher.load()
        teacher.load()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert messages == [f"teacher 'mae': tiny from {path} (mmpretrain format{named}), 42/42 tensors, sha256 {digest}; "
                        'left aside: nothing']
    assert_unchanged(teacher.vit, state)
    assert [p for p in teacher.parameters() if p.requires_grad] == []


def refused(teacher, error, match):
    """Loading fails so, changes nothing, and leaves the teacher unusable."""
    before = snapshot(teacher)
    with pytest.raises(error, match=match):
        teacher.load()
    assert_unchanged(teacher, before)
    with pytest.raises(RuntimeError, match='has no weights yet'):
        features(teacher, random_images())


def resave(checkpoint, change):
    path, state = checkpoint
    change(state)
    torch.save(state, path)
    return ViTTeacher(tiny_card(), checkpoint=str(path))


def test_load__refuses_a_missing_tensor(checkpoint):
    teacher = resave(checkpoint, lambda state: state.pop('layers.1.ffn.layers.1.bias'))
    refused(teacher, ValueError, r"does not fit card 'tiny' \(3 layers of width 32, patch 8\): "
                                 r'1 missing \(layers\.1\.ffn\.layers\.1\.bias\)\. Nothing was loaded')


def test_load__refuses_an_unexpected_tensor(checkpoint):
    teacher = resave(checkpoint, lambda state: state.update({'layers.0.attn.gamma': torch.ones(32)}))
    refused(teacher, ValueError, r'1 unexpected \(layers\.0\.attn\.gamma\)\. Nothing was loaded')


def test_load__refuses_another_shape(checkpoint):
    teacher = resave(checkpoint, lambda state: state.update(pos_embed=torch.ones(1, 26, 32)))
    refused(teacher, ValueError,
            r'1 of another shape \(pos_embed is \(1, 26, 32\) instead of \(1, 17, 32\)\)\. Nothing was loaded')


def test_load__refuses_a_shape_that_would_broadcast(checkpoint):
    teacher = resave(checkpoint, lambda state: state.update(cls_token=torch.ones(1, 1, 1)))
    refused(teacher, ValueError, r'cls_token is \(1, 1, 1\) instead of \(1, 1, 32\)')


def test_load__refuses_another_architecture(tmp_path):
    torch.save(random_teacher(tiny_card(depth=4, embed_dims=48)).vit.state_dict(), tmp_path / 'w.pth')
    # 12 tensors of the fourth layer; of the 42 others all have the width in their shape.
    refused(ViTTeacher(tiny_card(), checkpoint=str(tmp_path / 'w.pth')), ValueError,
            r'12 unexpected \(layers\.3\.ln1\.weight, .*, \.\.\.\); 42 of another shape \(cls_token is \(1, 1, 48\) '
            r'instead of')


@pytest.mark.parametrize('pre_norm', [True, False])
def test_load__refuses_a_model_with_another_pre_norm(pre_norm, tmp_path):
    torch.save(random_teacher(tiny_card(pre_norm=not pre_norm)).vit.state_dict(), tmp_path / 'w.pth')
    teacher = ViTTeacher(tiny_card(pre_norm=pre_norm), checkpoint=str(tmp_path / 'w.pth'))
    refused(teacher, ValueError, '(2 missing.*1 unexpected|1 missing.*2 unexpected)')


def test_load__refuses_an_unknown_format(tmp_path):
    torch.save({'layer1.0.conv1.weight': torch.ones(1), 'fc.bias': torch.ones(1)}, tmp_path / 'w.pth')
    refused(ViTTeacher(tiny_card(), checkpoint=str(tmp_path / 'w.pth')), ValueError,
            r'in no known format: expected the keys of one of mmpretrain, openai-clip, moco-v3, timm; found '
            r'layer1\.0\.conv1\.weight, fc\.bias')


def test_load__refuses_a_missing_file(tmp_path):
    refused(ViTTeacher(tiny_card(), checkpoint=str(tmp_path / 'no.pth')), FileNotFoundError, 'does not exist')


def test_load__auto_without_url():
    refused(ViTTeacher(tiny_card(), name='mine'), ValueError,
            "card 'tiny' names no URL: set checkpoint of teacher 'mine' to the path")


def test_load__auto_fetches_the_file_of_the_card(checkpoint, server, cache):
    path, state = checkpoint
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (server.folder / 'w.pth').write_bytes(path.read_bytes())
    teacher = ViTTeacher(tiny_card(url=f'{server.url}/w.pth', sha256=digest[:8]))
    teacher.load()
    assert_unchanged(teacher.vit, state)
    assert server.requested == ['/w.pth']


def test_load__url_as_checkpoint(checkpoint, server, cache):
    path, state = checkpoint
    (server.folder / 'w.pth').write_bytes(path.read_bytes())
    teacher = ViTTeacher(tiny_card(), checkpoint=f'{server.url}/w.pth')
    teacher.load()
    assert_unchanged(teacher.vit, state)


def test_load__auto_refuses_a_cached_file_of_another_sha256(checkpoint, cache):
    cache.mkdir()
    (cache / 'w.pth').write_bytes(checkpoint[0].read_bytes())
    digest = hashlib.sha256(checkpoint[0].read_bytes()).hexdigest()
    teacher = ViTTeacher(tiny_card(url='http://127.0.0.1:9/w.pth', sha256='0badc0de'))
    refused(teacher, ValueError, f"has sha256 {digest}, but card 'tiny' expects 0badc0de: .*Delete it to fetch")


def test_find_card__unknown_name():
    with pytest.raises(ValueError, match=r"unknown teacher card 'mae-vit-b'\. Did you mean 'mae-vit-b-p16'\?"):
        ViTTeacher('mae-vit-b')
    with pytest.raises(ValueError, match=r"unknown teacher card 'zzz'\. The cards are clip-vit-b-p16, ") as caught:
        find_card('zzz')
    assert all(name in str(caught.value) for name in CARDS)


def test_find_card__bad_dict():
    with pytest.raises(ValueError, match=r"a teacher card has no fields \['patch'\]: the fields are \[.*'patch_size'"):
        find_card({**tiny_card(), 'patch': 8})
    card = tiny_card()
    del card['mean'], card['depth']
    with pytest.raises(ValueError, match=r"the teacher card lacks \['depth', 'mean'\]"):
        find_card(card)


def test_find_card__dict_and_card():
    card = find_card(tiny_card(mlp_ratio=2.0))
    assert card == TeacherCard(**tiny_card(mlp_ratio=2.0))
    assert find_card(card) is card
    assert card.backbone()['arch'] == dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)


@pytest.mark.parametrize('name', CARDS)
def test_cards__facts(name):
    card = CARDS[name]
    width, depth, heads = dict(b=(768, 12, 12), l=(1024, 24, 16))[re.search(r'-vit-(\w)-', name)[1]]
    assert (card.embed_dims, card.depth, card.num_heads) == (width, depth, heads)
    assert card.patch_size == int(name.rsplit('-p', 1)[1])
    is_clip = name.startswith('clip')
    assert (card.pre_norm, card.activation, card.norm_eps) == (
        (True, 'quick_gelu', 1e-5) if is_clip else (False, 'gelu', 1e-6))
    mean = (0.48145466, 0.4578275, 0.40821073) if is_clip else (0.485, 0.456, 0.406)
    std = (0.26862954, 0.26130258, 0.27577711) if is_clip else (0.229, 0.224, 0.225)
    assert card.mean == pytest.approx([255 * x for x in mean], abs=1e-5)
    assert card.std == pytest.approx([255 * x for x in std], abs=1e-5)
    assert card.url.startswith('https://')
    assert card.sha256 is None or card.sha256 in card.url


def test_frozen_teachers__copies_share():
    teachers = FrozenTeachers(mae=random_teacher())
    for copied, owned in ((copy.copy(teachers), True), (copy.deepcopy(teachers), False)):
        assert copied['mae'] is teachers['mae']
        assert (copied.owned, teachers.owned) == (owned, True)
