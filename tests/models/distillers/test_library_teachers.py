"""Teachers of timm and transformers inside a distiller that is built from a config."""
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from mmhdistill.registry import MODELS
from tests.helpers import IMAGENET, log_messages, random_images, randomise, tiny_distiller, without_gradient

NAME = 'vit_base_patch16_224.augreg_in21k'
TIMM = dict(embed_dim=48, depth=2, num_heads=4)
CARD = dict(embed_dims=48, depth=2, num_heads=4, mean=[127.5] * 3, std=[127.5] * 3, licence='Apache-2.0')
LOSSES = dict(
    feature=dict(type='mmhdistill.FeatureLoss', teacher='clip'),
    relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae', kinds=['qk', 'vv'], layers=[(1, 0), (2, 1)]))


@pytest.fixture
def timm_file(tmp_path):
    import timm
    torch.manual_seed(0)
    model = randomise(timm.create_model(NAME, num_classes=9, **TIMM))
    save_file(model.state_dict(), tmp_path / 'timm.safetensors')
    return str(tmp_path / 'timm.safetensors')


@pytest.fixture
def huggingface_folder(tmp_path):
    import transformers
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                                    image_size=32, patch_size=8)
    randomise(transformers.ViTForImageClassification(config)).save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    return str(tmp_path)


@pytest.fixture
def configs(timm_file, huggingface_folder):
    """Per library: the config of its teacher, and of a ViTTeacher of the same weights."""
    by_card = dict(type='mmhdistill.ViTTeacher')
    return {
        'timm': (dict(type='mmhdistill.TimmTeacher', model=NAME, checkpoint=timm_file, model_args=TIMM),
                 dict(by_card, checkpoint=timm_file,
                      card=dict(CARD, name='timm', patch_size=16, resampling='bicubic-antialias'))),
        'transformers': (dict(type='mmhdistill.HuggingFaceTeacher', model=huggingface_folder),
                         dict(by_card, checkpoint=f'{huggingface_folder}/model.safetensors',
                              card=dict(CARD, name='hf', patch_size=8, img_size=32, mlp_ratio=2.0, norm_eps=1e-12)))
    }


def distiller(clip, mae, masked=True, **kwargs):
    torch.manual_seed(0)
    masker = dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.5, teacher='mae',
                  num_stages=2) if masked else None
    model = MODELS.build(tiny_distiller(teachers=dict(clip=clip, mae=mae), losses=LOSSES, masker=masker, **kwargs))
    torch.manual_seed(0)
    model.init_weights()
    randomise(model)
    return model


def step(model):
    losses = model(random_images(), mode='loss')
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}, \
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('clip, mae', [('timm', 'transformers'), ('transformers', 'timm'), ('timm', 'timm')])
def test_loss__is_that_of_a_card_with_the_same_weights(configs, clip, mae, masked):
    model = distiller(configs[clip][0], configs[mae][0], masked)
    losses, gradients = step(model)
    expected, expected_gradients = step(distiller(configs[clip][1], configs[mae][1], masked))
    assert set(losses) == set(expected) == {'loss/feature', 'loss/relation'}
    for name, value in losses.items():
        assert value == pytest.approx(expected[name], rel=1e-5)
        assert 1e-4 < value < 1e2
    assert without_gradient(model) == []
    assert len(gradients) > 30
    largest = max(x.abs().max() for x in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 1e-5 * largest, name
    assert min(gradients[name].abs().max() for name in gradients if name.endswith('qkv.weight')) > 0


def test_loss__is_another_with_another_teacher(configs):
    by_timm, _ = step(distiller(configs['timm'][0], configs['timm'][0]))
    by_huggingface, _ = step(distiller(configs['transformers'][0], configs['transformers'][0]))
    for name, value in by_timm.items():
        assert abs(value / by_huggingface[name] - 1) > 1e-4


def test_init_weights__prints_a_receipt_of_each_teacher(configs, timm_file, huggingface_folder):
    with log_messages() as messages:
        model = distiller(configs['timm'][0], configs['transformers'][0])
    receipts = [message for message in messages if message.startswith("teacher '") and '\n' in message]
    assert [text.split(':')[0] for text in receipts] == ["teacher 'clip'", "teacher 'mae'"]
    timm, huggingface = (text.splitlines() for text in receipts)
    assert timm[1] == f'  file     {timm_file}'
    assert timm[3] == '  tensors  30/30, timm format, float32; left aside: head.* (2)'
    assert timm[5] == '  tokens   64x64 px, 4x4 patches; extra tokens: 1; positions from 14x14 to 4x4 by timm'
    assert timm[6].startswith('  runs     layers 0 to 1 of 2, ')
    assert huggingface[1] == f'  file     {huggingface_folder}/model.safetensors'
    assert huggingface[3] == '  tensors  38/38, transformers format, float32; left aside: classifier.* (2)'
    assert huggingface[5] == '  tokens   32x32 px, 4x4 patches; extra tokens: 1; positions as trained'
    assert model.manifest['clip']['model'].startswith(f'{NAME} of timm ')
    json.dumps(model.manifest)
    # Patches of 3 x 16 x 16 by 48; two blocks of 12 x 48^2 weights on 17 tokens; scores and their use.
    flops = 2 * 16 * 768 * 48 + 2 * (2 * 17 * 12 * 48**2 + 4 * 17**2 * 48)
    assert model.manifest['clip']['run']['gflops'] == pytest.approx(flops / 1e9, rel=1e-6)


def test_init__teachers_are_outside_the_module_tree(configs):
    model = distiller(configs['timm'][0], configs['transformers'][0])
    teachers = [p for teacher in model.teachers.values() for p in teacher.parameters()]
    assert len(teachers) == 30 + 40
    owned = {id(p) for p in model.parameters()}
    assert [p for p in teachers if id(p) in owned or p.requires_grad or p.grad is not None] == []
    assert {name.split('.')[0] for name in model.state_dict()} == {'backbone', 'losses'}
    step(model)
    assert [p for p in teachers if p.grad is not None] == []
    model.double()
    assert {p.dtype for p in teachers} == {torch.float64}


def test_init__relations_that_cannot_be_read_are_refused_before_training():
    beit = dict(type='mmhdistill.TimmTeacher', model='beit_base_patch16_224.in22k_ft_in22k', checkpoint=None,
                model_args=TIMM)
    model = MODELS.build(tiny_distiller(teachers=dict(mae=beit), masker=None, losses=dict(relation=LOSSES['relation'])))
    with pytest.raises(ValueError, match="^teacher 'mae', beit_base_patch16_224.in22k_ft_in22k of timm, cannot be read "
                                         'as asked: its attention adds a mask or a position bias'):
        model.init_weights()


def test_init__images_are_those_of_the_preprocessor(configs):
    model = distiller(configs['timm'][0], configs['transformers'][0])
    for teacher in model.teachers.values():
        torch.testing.assert_close(teacher.scale.flatten(), torch.tensor(IMAGENET['std']) / 127.5)
        torch.testing.assert_close(teacher.shift.flatten(), (torch.tensor(IMAGENET['mean']) - 127.5) / 127.5)


def test_import__the_libraries_are_imported_by_teachers_that_need_them():
    """mmpretrain imports transformers by itself where it is installed."""
    code = ('import sys, mmhdistill, mmpretrain.models\n'
            "libraries = {'timm', 'transformers', 'open_clip'}\n"
            'before = libraries & set(sys.modules)\n'
            'import mmhdistill.models\n'
            "assert mmhdistill.models.TimmTeacher.library == 'timm'\n"
            'print(sorted(libraries & set(sys.modules) - before), sorted(before))')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    new, by_mmpretrain = run.stdout.strip().splitlines()[-1].split('] [')
    assert new == '['
    assert 'timm' not in by_mmpretrain and 'open_clip' not in by_mmpretrain
