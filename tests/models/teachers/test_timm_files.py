"""What a :class:`TimmTeacher` takes besides timm's own file of its very model, and what it refuses."""
import re

import pytest
import torch

from mmhdistill.models.teachers import TimmTeacher
from tests.helpers import IMAGENET, OTHER, randomise

from .native import multi_head_taps

SMALL = dict(embed_dim=48, depth=3, num_heads=4)
FEATURES = {2: frozenset({'features'})}
DINO = 'vit_base_patch16_224.dino'
CLIP = 'vit_base_patch32_clip_224.openai'


def create(name, **kwargs):
    import timm
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{**SMALL, **kwargs})).eval()


def load(name, state, path, **kwargs):
    torch.save(state, path)
    teacher = TimmTeacher(name, checkpoint=str(path), model_args=SMALL, **kwargs)
    return teacher, teacher.load()


def visual(size=224, patch=32, width=48):
    """open_clip's image tower."""
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    return randomise(VisionTransformer(size, patch, width, 3, 4, 4.0, output_dim=20)).eval()


def published(tower):
    """In the layout of open_clip's and OpenAI's files, with a text tower."""
    text = dict(positional_embedding=torch.ones(7, 8), text_projection=torch.ones(8, 20), logit_scale=torch.ones([]))
    return {**{f'visual.{name}': x for name, x in tower.state_dict().items()}, **text,
            'token_embedding.weight': torch.zeros(11, 8), 'ln_final.weight': torch.ones(8),
            'transformer.resblocks.0.ln_1.weight': torch.ones(8)}


def test_load__files_in_the_layout_of_clip(tmp_path):
    tower = visual()
    teacher, receipt = load(CLIP, published(tower), tmp_path / 'w.pth')
    assert (receipt.matched, receipt.total, receipt.format) == (43, 43, "timm's conversion of another")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = multi_head_taps(tower, images)[2, 'features']
    found = teacher(images, (7, 7), FEATURES).taps[2, 'features']
    assert found.shape == expected.shape == (2, 50, 48)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize('size, patch, wrong', [
    (224, 16, 'visual.conv1.weight is (48, 3, 16, 16) for a patch_embed.proj.weight of (48, 3, 32, 32)'),
    (96, 32, 'visual.positional_embedding is (10, 48) for a pos_embed of (1, 50, 48)')])
def test_load__files_in_the_layout_of_clip_are_not_resampled(tmp_path, size, patch, wrong):
    with pytest.raises(ValueError, match=re.escape(wrong)):
        load(CLIP, published(visual(size, patch)), tmp_path / 'w.pth')


@pytest.mark.parametrize('change', ['missing', 'unexpected', 'width'])
def test_load__files_in_the_layout_of_clip_that_do_not_fit(tmp_path, change):
    state, key = published(visual(width=64 if change == 'width' else 48)), 'visual.transformer.resblocks.1.mlp.c_fc'
    if change == 'missing':
        del state[f'{key}.weight']
    elif change == 'unexpected':
        state['visual.transformer.resblocks.1.ls_1.gamma'] = torch.ones(48)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/w\.pth does not fit '{CLIP}' of timm \(.*\)\. "
                                         'Nothing was loaded; give the file of this model, or the model') as caught:
        load(CLIP, state, tmp_path / 'w.pth')
    reason = dict(missing='blocks.1.mlp.fc1.weight', unexpected='ls_1', width='size mismatch')[change]
    assert reason in str(caught.value)


@pytest.mark.parametrize('other, args, wrong', [
    ('vit_base_patch8_224.dino', {},
     '2 of another shape (pos_embed is (1, 785, 48) instead of (1, 197, 48); patch_embed.proj.weight is (48, 3, 8, 8) '
     'instead of (48, 3, 16, 16))'),
    (DINO, dict(img_size=96), '1 of another shape (pos_embed is (1, 37, 48) instead of (1, 197, 48))'),
])
def test_load__patches_and_positions_of_another_model_are_not_resampled(tmp_path, other, args, wrong):
    state = create(other, **args).state_dict()
    message = f"{tmp_path}/w.pth does not fit '{DINO}' of timm ({wrong}). Nothing was loaded; give the file of this " \
              'model, or the model of this file.'
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        load(DINO, state, tmp_path / 'w.pth')
    # The file is right for a model of its own shape.
    assert TimmTeacher(other, checkpoint=str(tmp_path / 'w.pth'), model_args={**SMALL, **args}).load().matched == 42


def test_load__classes_of_another_data_set_are_no_misfit(tmp_path):
    state = create(DINO, num_classes=7).state_dict()
    assert load(DINO, state, tmp_path / 'w.pth')[1].unused == ['head.bias', 'head.weight']


def test_load__long_reasons_are_cut(tmp_path):
    state = {name.replace('blocks', 'layers'): x for name, x in create(DINO).state_dict().items()}
    with pytest.raises(ValueError, match=rf"^{tmp_path}/w\.pth does not fit '{DINO}' of timm \(") as caught:
        load(DINO, state, tmp_path / 'w.pth')
    text = str(caught.value)
    reason = re.search(r' of timm \((.*)\)\. Nothing was loaded; give the file of this model, or the model', text)[1]
    assert (len(reason), reason[-4:], text.count('\n')) == (404, ' ...', 0)
    assert reason.startswith('Error(s) in loading state_dict for VisionTransformer: Missing key(s) in state_dict: '
                             '"blocks.0.norm1.weight", ')


@pytest.mark.parametrize('name, reason', [
    ('vit_nonesuch', 'Unknown model (vit_nonesuch)'),
    ('vit_base_patch16_224.nonesuch', 'Invalid pretrained tag (nonesuch) for vit_base_patch16_224.')])
def test_init__unknown_names(name, reason):
    import timm
    message = (f"teacher 'x': timm {timm.__version__} does not know '{name}' ({reason}). See timm.list_models("
               'pretrained=True); newer models need a newer timm.')
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        TimmTeacher(name, name='x')


@pytest.mark.parametrize('args, named', [
    (dict(pretrained=True), "['pretrained']"),
    (dict(num_classes=3, img_size=96, checkpoint_path='w.pth'), "['checkpoint_path', 'num_classes']"),
    (dict(pretrained_cfg={}), "['pretrained_cfg']"),
    (dict(pretrained_cfg_overlay={}), "['pretrained_cfg_overlay']"),
    (dict(cache_dir='.'), "['cache_dir']")])
def test_init__arguments_that_decide_what_is_loaded(args, named):
    message = f"teacher 'x' gives timm {named} in model_args, which decide what is loaded: leave them out; " \
              'weights are named by model or checkpoint.'
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        TimmTeacher(DINO, name='x', model_args=args)


@pytest.mark.parametrize('given', [('mean', ), ('std', ), ('mean', 'std')])
def test_init__normalisation_as_arguments(given):
    own = {**IMAGENET, **{key: OTHER[key] for key in given}}
    teacher = TimmTeacher(DINO, checkpoint=None, model_args=SMALL, **{key: OTHER[key] for key in given},
                          input_mean=[0.0] * 3, input_std=[1.0] * 3)
    assert (teacher.mean, teacher.std) == (pytest.approx(own['mean']), pytest.approx(own['std']))
    receipt = teacher.load()
    assert (receipt.mean, receipt.std) == (teacher.mean, teacher.std)
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 255
    mean, std = (torch.tensor(own[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        expected = teacher.model.forward_features((pixels - mean) / std)
    found = teacher(pixels, (14, 14), FEATURES).taps[2, 'features']
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_init__normalisation_of_images_in_0_1_is_refused():
    with pytest.raises(ValueError, match=r"^teacher 'x' has mean 0\.5, 0\.5, 0\.5 and std .*, as for images in 0-1: "
                                         'give mean and std of images in 0-255, 255 times as large'):
        TimmTeacher(DINO, name='x', mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize('args, tokens, has', [
    ({}, 1, True), (dict(reg_tokens=4), 5, True), (dict(class_token=False, global_pool='avg', fc_norm=False), 0, False),
    (dict(class_token=False, reg_tokens=4, global_pool='avg', fc_norm=False), 4, False)])
def test_spec__registers_are_no_class_token(args, tokens, has):
    spec = TimmTeacher(DINO, checkpoint=None, model_args={**SMALL, **args}).spec
    assert (spec.num_extra_tokens, spec.has_class_token) == (tokens, has)
