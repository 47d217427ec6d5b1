import hashlib
import re
from pathlib import Path

import pytest
import torch

from mmhdistill.models import ViTTeacher
from mmhdistill.registry import MODELS
from tests.helpers import OTHER, log_messages, randomise, tiny_card, tiny_distiller, tiny_student, tiny_teacher

FEATURE = dict(type='mmhdistill.FeatureLoss', teacher='clip')
RELATION = dict(type='mmhdistill.TokenRelationLoss', teacher='mae')
CLIP = tiny_card(name='clip-like', embed_dims=48, pre_norm=True, licence='MIT', **OTHER)
MAE = tiny_card(name='mae-like')

# Linear layers of a block, as multiply-adds of one token: attention and the MLP.
CLIP_BLOCK, MAE_BLOCK, STUDENT_BLOCK = 4 * 48**2 + 2 * 48 * 192, 4 * 32**2 + 2 * 32 * 128, 4 * 32**2 + 2 * 32 * 64


def stem(width, patches=16):
    return 2 * patches * 3 * 8**2 * width


def blocks(linear, width, tokens):
    """FLOPs of one block for each of the counts ``tokens``."""
    return sum(2 * n * linear + 4 * n**2 * width for n in tokens)


def loaded(card, folder, **kwargs):
    path = folder / f'{card["name"]}.pth'
    torch.save(randomise(ViTTeacher(card, checkpoint=None)).vit.state_dict(), path)
    return dict(type='mmhdistill.ViTTeacher', card=card, checkpoint=str(path), **kwargs)


def init(**kwargs):
    """The model after init_weights(), and what it said of its teachers."""
    model = MODELS.build(tiny_distiller(**kwargs))
    with log_messages() as messages:
        model.init_weights()
    return model, [m for m in messages if m.startswith('teacher')]


def shares(model):
    return {name: receipt['run']['share'] for name, receipt in model.manifest.items()}


@pytest.fixture
def teachers(tmp_path):
    return dict(clip=loaded(CLIP, tmp_path), mae=loaded(MAE, tmp_path))


def test_init_weights__one_receipt_per_teacher(teachers):
    model, messages = init(teachers=teachers, masker=None)
    assert len(messages) == 2
    hashes = [hashlib.sha256(Path(cfg['checkpoint']).read_bytes()).hexdigest() for cfg in teachers.values()]
    unpinned = 'not pinned: compare it with a source that you trust'
    clip = stem(48) + blocks(CLIP_BLOCK, 48, [17] * 3)
    # Of layer 1 of 3, queries and keys alone.
    mae = stem(32) + blocks(MAE_BLOCK, 32, [17]) + 2 * 17 * 2 * 32**2
    step = clip + mae + 3 * (stem(32) + blocks(STUDENT_BLOCK, 32, [17] * 3))
    assert messages == [f"""\
teacher 'clip': clip-like (licence MIT)
  file     {teachers["clip"]["checkpoint"]}
  sha256   {hashes[0]}, {unpinned}
  tensors  43/43, mmpretrain format, float32; left aside: nothing
  images   RGB mean 100.00 110.00 120.00, std 60.00 70.00 80.00 in 0-255
  tokens   32x32 px, 4x4 patches; extra tokens: 1 class; positions as trained
  runs     layers 0 to 2 of 3, {clip / 1e6:.1f} MFLOPs an image, {clip / step:.0%} of the step's""", f"""\
teacher 'mae': mae-like
  file     {teachers["mae"]["checkpoint"]}
  sha256   {hashes[1]}, {unpinned}
  tensors  42/42, mmpretrain format, float32; left aside: nothing
  images   RGB mean 123.67 116.28 103.53, std 58.40 57.12 57.38 in 0-255
  tokens   32x32 px, 4x4 patches; extra tokens: 1 class; positions as trained
  runs     layers 0 to 1 of 3, {mae / 1e6:.1f} MFLOPs an image, {mae / step:.0%} of the step's"""]
    assert shares(model) == pytest.approx(dict(clip=clip / step, mae=mae / step), rel=1e-9)
    assert model.manifest['mae']['run']['gflops'] * 1e9 == pytest.approx(mae, rel=1e-9)
    assert {name: receipt['sha256'] for name, receipt in model.manifest.items()} == dict(zip(('clip', 'mae'), hashes))


def test_init_weights__share_with_input_masking(teachers):
    # 16 patches, three stages of 0.8: 8 are left. The scorer reads hidden states down to layer 2 of 3.
    model, _ = init(teachers=teachers)
    clip = stem(48) + blocks(CLIP_BLOCK, 48, [17] * 3)
    mae = stem(32) + blocks(MAE_BLOCK, 32, [17] * 3)
    step = clip + mae + 3 * (stem(32) + blocks(STUDENT_BLOCK, 32, [9] * 3))
    assert shares(model) == pytest.approx(dict(clip=clip / step, mae=mae / step), rel=1e-9)
    assert [receipt['run']['deepest_layer'] for receipt in model.manifest.values()] == [2, 2]


def test_init_weights__share_with_encoder_masking(teachers):
    # All, a half and a quarter of the patches, each for one block.
    masker = dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder', keep_rate=0.5)
    model, _ = init(teachers=teachers, masker=masker, losses=dict(feature=FEATURE))
    clip = stem(48) + blocks(CLIP_BLOCK, 48, [17] * 3)
    step = clip + 3 * (stem(32) + blocks(STUDENT_BLOCK, 32, [17, 9, 5]))
    assert shares(model) == pytest.approx(dict(clip=clip / step), rel=1e-9)


def test_init_weights__share_of_a_teacher_beside_one_of_random_weights(teachers):
    # It is run, so it counts, though nothing is known of it.
    model, messages = init(teachers={**teachers, 'clip': {**tiny_teacher(), 'card': CLIP}}, masker=None)
    clip = stem(48) + blocks(CLIP_BLOCK, 48, [17] * 3)
    mae = stem(32) + blocks(MAE_BLOCK, 32, [17]) + 2 * 17 * 2 * 32**2
    step = clip + mae + 3 * (stem(32) + blocks(STUDENT_BLOCK, 32, [17] * 3))
    assert shares(model) == pytest.approx(dict(clip=clip / step, mae=mae / step), rel=1e-9)
    assert messages[0] == "teacher 'clip' has random weights (checkpoint=None): good for trying things out only"
    assert messages[1] == f"""\
teacher 'clip': clip-like
  file     random weights
  tensors  0/43, float32; left aside: nothing
  images   RGB mean 100.00 110.00 120.00, std 60.00 70.00 80.00 in 0-255
  tokens   32x32 px, 4x4 patches; extra tokens: 1 class; positions as trained
  runs     layers 0 to 2 of 3, {clip / 1e6:.1f} MFLOPs an image, {clip / step:.0%} of the step's"""
    assert len(messages) == 3 and messages[2].startswith("teacher 'mae': mae-like\n")


def test_init_weights__a_grid_of_its_own(tmp_path):
    teacher = loaded({**CLIP, 'patch_size': 4, 'img_size': 16, 'registers': 2}, tmp_path, image_size=(24, 32))
    model, (message, ) = init(teachers=dict(clip=teacher), masker=None, losses=dict(feature=FEATURE))
    run = model.manifest['clip']['run']
    assert (run['grid'], run['image_size']) == ([6, 8], [24, 32])
    assert ('  tokens   24x32 px, 6x8 patches; extra tokens: 1 class + 2 register; positions resampled from 4x4 to '
            '6x8 patches (bicubic)\n') in message
    clip = 2 * 48 * 3 * 4**2 * 48 + blocks(CLIP_BLOCK, 48, [3 + 48] * 3)
    assert run['gflops'] * 1e9 == pytest.approx(clip, rel=1e-9)


def test_init_weights__a_smaller_share_beside_a_larger_student(teachers):
    found = []
    for layers in (3, 6):
        arch = dict(embed_dims=32, num_layers=layers, num_heads=4, feedforward_channels=64)
        model, _ = init(teachers=teachers, masker=None, losses=dict(feature=FEATURE), backbone=tiny_student(arch=arch))
        found.append(shares(model)['clip'])
    block = blocks(STUDENT_BLOCK, 32, [17])
    assert 1 / found[1] - 1 / found[0] == pytest.approx(
        3 * 3 * block / (stem(48) + blocks(CLIP_BLOCK, 48, [17] * 3)), rel=1e-6)


def test_init_weights__twice_loads_once(teachers):
    model, first = init(teachers=teachers)
    before = model.manifest
    with log_messages() as messages:
        model.init_weights()
    assert len(first) == 2
    assert [m for m in messages if m.startswith('teacher')] == []
    assert model.manifest == before


def test_init_weights__random_weights_are_told_once():
    model, first = init()
    # A warning and a receipt of each.
    assert len(first) == 4
    with log_messages() as messages:
        model.init_weights()
    assert [m for m in messages if m.startswith('teacher')] == []


def test_manifest__empty_before_loading_and_none_of_random_weights(teachers):
    assert MODELS.build(tiny_distiller(teachers=teachers)).manifest == {}
    model, _ = init()
    assert {name: (receipt['source'], receipt['matched'], receipt['total'], receipt['sha256'], receipt['role'])
            for name, receipt in model.manifest.items()} == {
        'clip': ('random weights', 0, 43, None, 'teacher'), 'mae': ('random weights', 0, 42, None, 'teacher')}


def test_init_weights__each_tensor_of_a_file_that_is_left_aside_is_told(tmp_path):
    cfg = loaded(MAE, tmp_path)
    state = torch.load(cfg['checkpoint'], weights_only=True)
    torch.save(dict(model={**state, 'mask_token': torch.ones(1, 1, 32)}, epoch=3), cfg['checkpoint'])
    model, (message, ) = init(teachers=dict(mae=cfg), losses=dict(relation=RELATION))
    assert re.search(r"^  tensors  42/42, mmpretrain format in entry 'model', float32; left aside: mask_token, epoch$",
                     message, re.M)
    assert model.manifest['mae']['unused'] == ['mask_token', 'epoch']
