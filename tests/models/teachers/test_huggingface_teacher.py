import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmhdistill.models.teachers import HuggingFaceTeacher
from tests.helpers import IMAGENET, OTHER, randomise

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=64,
             patch_size=16)
TEXT = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=100)
EVERYTHING = {0: frozenset('qkv'), 1: frozenset('qkv') | {'hidden', 'features'}}
FEATURES = {1: frozenset({'features'})}
# Class of the saved model -> extra tokens, tensors that run.
MODELS = {
    'ViTModel': (1, 38),
    'ViTForImageClassification': (1, 38),
    'Dinov2Model': (1, 43),
    'Dinov2WithRegistersModel': (5, 44),
    'DeiTModel': (2, 39),
    'CLIPModel': (1, 37),
    'SiglipModel': (0, 37),
}


@pytest.fixture
def save(tmp_path):
    """Saves a model of transformers as the hub has it, with random weights, and returns it and its folder."""
    import transformers

    def make(kind, normalisation=True, **sizes):
        torch.manual_seed(0)
        config = getattr(transformers, kind).config_class
        sizes = {**SIZES, **sizes}
        config = config(vision_config=sizes, text_config=TEXT) if kind in ('CLIPModel', 'SiglipModel') \
            else config(**sizes)
        model = randomise(getattr(transformers, kind)(config)).eval()
        model.save_pretrained(tmp_path / kind)
        if normalisation:
            cfg = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5], size=64)
            (tmp_path / kind / 'preprocessor_config.json').write_text(json.dumps(cfg))
        return model, tmp_path / kind

    return make


def tower(model):
    """The image tower, without a head."""
    model = getattr(model, 'vision_model', model)
    return getattr(model, 'vit', model)


@torch.no_grad()
def native_taps(model, images):
    """Blocks' outputs, the final norm's, and what the linear layers for q, k, v return."""
    model, taps, handles = tower(model), {}, []
    encoder = model.encoder
    for index, block in enumerate(getattr(encoder, 'layer', None) or encoder.layers):
        names = {'query': 'q', 'key': 'k', 'value': 'v', 'q_proj': 'q', 'k_proj': 'k', 'v_proj': 'v'}
        for name, module in block.named_modules():
            if kind := names.get(name.rpartition('.')[2]):
                handles.append(module.register_forward_hook(
                    lambda _, __, out, key=(index, kind): taps.update({key: out})))
        handles.append(block.register_forward_hook(
            lambda _, __, out, index=index: taps.update({(index, 'hidden'): out[0]})))
    out = model(pixel_values=images, interpolate_pos_encoding=True) if 'Dino' not in type(model).__name__ \
        else model(pixel_values=images)
    for handle in handles:
        handle.remove()
    clip = 'CLIP' in type(model).__name__
    taps[1, 'features'] = model.post_layernorm(out.last_hidden_state) if clip else out.last_hidden_state
    return taps


def random_images(grid, batch=2):
    return torch.randn(batch, 3, grid[0] * 16, grid[1] * 16, generator=torch.Generator().manual_seed(0))


def relative(found, expected):
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def load(folder, **kwargs):
    teacher = HuggingFaceTeacher(str(folder), **kwargs)
    return teacher, teacher.load()


@pytest.mark.parametrize('grid', [(4, 4), (3, 6)])
@pytest.mark.parametrize('kind', MODELS)
def test_forward__equals_transformers(save, kind, grid):
    native, folder = save(kind)
    extra, tensors = MODELS[kind]
    teacher, receipt = load(folder)
    assert (receipt.matched, receipt.total, receipt.source) == (tensors, tensors, str(folder / 'model.safetensors'))
    spec = teacher.spec
    assert (spec.num_extra_tokens, spec.depth, spec.embed_dims, spec.num_heads) == (extra, 2, 48, 4)
    images = random_images(grid)
    out, expected = teacher(images, grid, EVERYTHING), native_taps(native, images)
    assert {(layer, kind) for layer, kinds in EVERYTHING.items() for kind in kinds} == set(out.taps)
    errors = {key: relative(value, expected[key]) for key, value in out.taps.items()}
    assert max(errors.values()) < 1e-5, errors
    assert out.extra(1, 'features').shape == (2, extra, 48)
    assert out.patches(1, 'features').shape == (2, grid[0] * grid[1], 48)


def test_load__receipt(save):
    _, folder = save('ViTForImageClassification')
    teacher, receipt = load(folder, name='vit')
    assert receipt.unused == ['classifier.bias', 'classifier.weight']
    text = str(receipt).splitlines()
    assert re.fullmatch(rf"teacher 'vit': {re.escape(str(folder))} of transformers [\d.]+", text[0])
    assert text[3] == '  tensors  38/38, transformers format, float32; left aside: classifier.* (2)'
    assert text[4] == '  images   RGB mean 127.50 102.00 76.50, std 51.00 63.75 127.50 in 0-255'


def test_load__sha256(save):
    import hashlib
    _, folder = save('ViTModel')
    digest = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    receipt = load(folder, sha256=digest[:12])[1]
    assert (receipt.sha256, receipt.published) == (digest, True)
    assert load(folder)[1].published is None
    assert_refused(folder, rf'has sha256 {digest}, and 0badc0de is expected: it is damaged, or another file\. '
                   r'Give the right file, or correct the hash\.$', sha256='0badc0de')


@pytest.mark.parametrize('kind', ['ViTModel', 'CLIPModel'])
def test_load__half_precision_files(save, kind):
    native, folder = save(kind)
    native.half().save_pretrained(folder)
    teacher, receipt = load(folder)
    assert receipt.dtype == 'float16 in the file, float32 in memory'
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    state = {name.removeprefix('vision_model.'): x.float() for name, x in tower(native).state_dict().items()}
    own = {name.removeprefix('vision_model.'): x for name, x in teacher.model.state_dict().items()}
    assert len(own) == len(state) and [name for name, x in own.items() if not torch.equal(x, state[name])] == []


@pytest.mark.parametrize('student', [IMAGENET, OTHER])
def test_forward__renormalises_as_the_preprocessor(save, student):
    native, folder = save('Dinov2Model')
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own = [torch.tensor(x).view(3, 1, 1) for x in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.5])]
    theirs = [torch.tensor(student[key]).view(3, 1, 1) for key in ('mean', 'std')]
    teacher, _ = load(folder, input_mean=student['mean'], input_std=student['std'])
    found = teacher((pixels * 255 - theirs[0]) / theirs[1], (4, 4), FEATURES).taps[1, 'features']
    assert relative(found, native_taps(native, (pixels - own[0]) / own[1])[1, 'features']) < 1e-5
    assert relative(found, native_taps(native, pixels)[1, 'features']) > 1e-2


def test_init__normalisation_as_arguments(save):
    _, folder = save('ViTModel', normalisation=False)
    with pytest.raises(ValueError, match=rf"^teacher 'x', {re.escape(str(folder))} of transformers, does not say how "
                                         r'its images are normalised \(.*preprocessor_config.json.*\): give mean and '
                                         r'std, RGB in 0-255\.$'):
        HuggingFaceTeacher(str(folder), name='x')
    teacher, receipt = load(folder, **OTHER)
    assert (teacher.mean, teacher.std) == (receipt.mean, receipt.std) == (OTHER['mean'], OTHER['std'])
    torch.testing.assert_close(teacher.scale.flatten(), torch.ones(3))
    teacher, _ = load(folder, **OTHER, input_mean=IMAGENET['mean'], input_std=IMAGENET['std'])
    expected = [a / b for a, b in zip(IMAGENET['std'], OTHER['std'])]
    torch.testing.assert_close(teacher.scale.flatten(), torch.tensor(expected))


# 16 bits; no rescaling, so of images in 0-255; pixels in -1 to 1; normalised by mean and std of images in 0-255.
@pytest.mark.parametrize('settings, mean, std', [
    (dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3), [127.5] * 3, [127.5] * 3),
    (dict(do_rescale=False, image_mean=[100, 110, 120], image_std=[60, 70, 80]), [100, 110, 120], [60, 70, 80]),
    (dict(do_rescale=False, rescale_factor=1 / 255, image_mean=[9] * 3, image_std=[7] * 3), [9] * 3, [7] * 3),
    (dict(do_normalize=False), [0] * 3, [255] * 3),
    (dict(do_normalize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3), [0] * 3, [255] * 3),
    (dict(do_normalize=False, do_rescale=False), [0] * 3, [1] * 3),
    (dict(do_flip_channel_order=False, image_mean=[0.5] * 3, image_std=[0.25] * 3), [127.5] * 3, [63.75] * 3),
])
def test_init__normalisation_by_the_preprocessors_settings(save, settings, mean, std):
    from transformers import ViTImageProcessor
    native, folder = save('ViTModel')
    (folder / 'preprocessor_config.json').write_text(json.dumps(settings))
    teacher, _ = load(folder, input_mean=[0.0] * 3, input_std=[1.0] * 3)
    assert (teacher.mean, teacher.std) == (pytest.approx(mean), pytest.approx(std))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    known = {key: x for key, x in settings.items() if key != 'do_flip_channel_order'}
    seen = ViTImageProcessor(do_resize=False, **known)(list(pixels), return_tensors='pt')['pixel_values']
    found = pixels.float() * teacher.scale + teacher.shift
    assert relative(found, seen.float()) < 1e-6
    assert relative(teacher(pixels.float(), (4, 4), FEATURES).taps[1, 'features'],
                    native_taps(native, seen.float())[1, 'features']) < 1e-5


def test_init__images_that_are_bgr_are_refused(save):
    _, folder = save('ViTModel')
    (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
        do_flip_channel_order=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    with pytest.raises(ValueError, match=r'does not say how its images are normalised \(its images are BGR\): give '
                                         r'mean and std, RGB in 0-255\.$'):
        HuggingFaceTeacher(str(folder))


@pytest.mark.parametrize('folder_says', [True, False])
def test_init__normalisation_of_images_in_0_1_is_refused(save, folder_says):
    _, folder = save('ViTModel')
    given = {} if folder_says else dict(mean=[0.5] * 3, std=[0.5] * 3)
    if folder_says:
        (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
            do_rescale=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    with pytest.raises(ValueError, match=r"^teacher 'x' has mean .* and std 0\.5, 0\.5, 0\.5, as for images in "
                                         '0-1: give mean and std of images in 0-255, 255 times as large'):
        HuggingFaceTeacher(str(folder), name='x', **given)


def assert_refused(folder, reason, error=ValueError, **kwargs):
    teacher = HuggingFaceTeacher(str(folder), **kwargs)
    with pytest.raises(error, match=rf'^{re.escape(str(folder / "model.safetensors"))} {reason}') as caught:
        teacher.load()
    assert '\n' not in str(caught.value)
    assert {p.device.type for p in teacher.model.parameters()} == {'meta'}
    assert teacher.receipt is None
    with pytest.raises(RuntimeError, match="^teacher 'teacher' has no weights yet"):
        teacher(random_images((4, 4)), (4, 4), FEATURES)


def rewrite(folder, change):
    file = folder / 'model.safetensors'
    save_file(change(load_file(file)), file, metadata={'format': 'pt'})


def last_block(state):
    """One key inside the last block of the image tower."""
    return next(name for name in state if re.search(r'layers?\.1\..*weight$', name) and 'text_model' not in name)


BROKEN = {
    'missing': (lambda s: {k: x for k, x in s.items() if k != last_block(s)}, r'1 missing \({key}\)\.'),
    'renamed': (lambda s: {(k.replace('.1.', '.1.x') if k == last_block(s) else k): x for k, x in s.items()},
                r'1 missing \({key}\); 1 unexpected \({renamed}\)\.'),
    'of another shape': (lambda s: {k: (x[:-1].clone() if k == last_block(s) else x) for k, x in s.items()},
                         r'1 of another shape \({key} is \(47.*\) instead of \(48.*\)\)\.'),
    'without a block': (lambda s: {k: x for k, x in s.items() if not re.search(r'layers?\.1\.', k)},
                        r'1\d missing \(.*, \.\.\.\)\.'),
}


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('fault', BROKEN)
def test_load__refuses_a_file_that_does_not_fit(save, kind, fault):
    """Also a file of a model with a head, which names everything behind a prefix."""
    _, folder = save(kind)
    key = last_block(load_file(folder / 'model.safetensors'))
    change, reason = BROKEN[fault]
    rewrite(folder, change)
    reason = reason.replace('{key}', re.escape(key)).replace('{renamed}', re.escape(key.replace('.1.', '.1.x')))
    assert_refused(folder, rf"does not fit '{re.escape(str(folder))}' of transformers: {reason} Nothing was loaded; "
                           r'give the weights of this config\.json\.$')


@pytest.mark.parametrize('kind', MODELS)
def test_load__refuses_a_config_of_fewer_layers(save, kind):
    _, folder = save(kind)
    config = json.loads((folder / 'config.json').read_text())
    config.get('vision_config', config)['num_hidden_layers'] = 1
    for name in ('out_features', 'out_indices', 'stage_names'):
        config.pop(name, None)
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'model\.safetensors does not fit .*: 1\d unexpected \(.*, \.\.\.\)\. '
                                         'Nothing was loaded'):
        load(folder)


@pytest.mark.parametrize('kind', ['ViTModel', 'DeiTModel'])
def test_load__a_pooler_behind_the_last_block_may_be_missing(save, kind):
    native, folder = save(kind)
    rewrite(folder, lambda state: {name: x for name, x in state.items() if 'pooler' not in name})
    teacher, receipt = load(folder)
    assert (receipt.matched, receipt.total) == (MODELS[kind][1], ) * 2
    images = random_images((4, 4))
    found = teacher(images, (4, 4), FEATURES).taps[1, 'features']
    assert relative(found, native_taps(native, images)[1, 'features']) < 1e-5


def test_load__a_mask_token_and_ids_of_positions_are_left_aside(save):
    _, folder = save('CLIPModel')
    rewrite(folder, lambda state: {**state, 'vision_model.embeddings.position_ids': torch.arange(17)[None]})
    assert load(folder)[1].matched == 37
    _, folder = save('ViTModel')
    rewrite(folder, lambda state: {**state, 'embeddings.mask_token': torch.zeros(1, 1, 48)})
    assert load(folder)[1].unused == ['embeddings.mask_token']


@pytest.mark.parametrize('damage', [lambda content: content[:-5000], lambda content: content[:100],
                                    lambda content: b'\x80\x02' + content])
def test_load__refuses_a_damaged_file(save, damage):
    _, folder = save('ViTModel')
    file = folder / 'model.safetensors'
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(folder, rf'cannot be loaded as {re.escape(str(folder))} of transformers: Error while deserializing')


def test_load__a_pickle_is_not_read(save):
    """Only ``model.safetensors`` is."""
    _, folder = save('ViTModel')
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(FileNotFoundError, match=rf'^{re.escape(str(folder))}/model\.safetensors does not exist: give '
                                                r'the path of an existing file\.$'):
        load(folder)


def test_init__checkpoint_is_no_file(save):
    _, folder = save('ViTModel')
    with pytest.raises(ValueError, match="^HuggingFaceTeacher loads what its model stands for, got checkpoint='w.pth'"):
        HuggingFaceTeacher(str(folder), checkpoint='w.pth')


def test_init__masked_autoencoders_are_refused(save):
    """They drop patches at random in every forward."""
    _, folder = save('ViTMAEModel')
    with pytest.raises(ValueError, match=rf"^teacher 'mae', {re.escape(str(folder))} of transformers, masks its own "
                                         r'input at random: use ViTTeacher with a card \(mae-vit-b-p16, \.\.\.\) and '
                                         'checkpoint=FILE, which reads its file.$'):
        HuggingFaceTeacher(str(folder), name='mae')


@pytest.mark.parametrize('kind, sizes, reason', [
    ('SwinModel', dict(embed_dim=24, depths=[1, 1], num_heads=[2, 2], patch_size=4),
     r'its blocks return \[.*\] for 256 patches of 4 px, and a plain ViT returns \(images, tokens, channels\)'),
    ('ResNetModel', dict(embedding_size=16, hidden_sizes=[16, 16], depths=[1, 1], image_size=None, patch_size=None),
     'its patches are None and its images None, and square ones are expected'),
    ('ViTModel', dict(image_size=[64, 32]), r'its patches are 16 and its images \[64, 32\]'),
])
def test_init__models_that_are_no_plain_vit_are_refused(save, kind, sizes, reason):
    _, folder = save(kind, **sizes)
    with pytest.raises(ValueError, match=rf"^teacher 'teacher', {re.escape(str(folder))} of transformers, cannot be "
                                         f'read as asked: {reason}'):
        HuggingFaceTeacher(str(folder))


@pytest.mark.parametrize('pools_first', [False, True])
def test_beit__its_relations_are_refused(save, pools_first):
    """Its relative position bias is no part of q and k. It cannot be built without memory, and is with."""
    native, folder = save('BeitModel', use_mean_pooling=pools_first, use_relative_position_bias=True)
    teacher = HuggingFaceTeacher(str(folder))
    assert {p.device.type for p in teacher.model.parameters()} == {'cpu'}
    before = next(teacher.model.parameters()).clone()
    teacher.load()
    assert not torch.equal(next(teacher.model.parameters()), before)
    images = random_images((4, 4))
    hidden = []
    native.encoder.layer[1].register_forward_hook(lambda _, __, out: hidden.append(out[0]))
    with torch.no_grad():
        native(images)
    found = teacher(images, (4, 4), {1: frozenset({'hidden'})}).taps[1, 'hidden']
    assert relative(found, hidden[0]) < 1e-5
    with pytest.raises(ValueError, match='cannot be read as asked: its attention adds a mask or a position bias'):
        teacher.describe_run((4, 4), {0: frozenset('qk')})
    if pools_first:
        with pytest.raises(ValueError, match='cannot be read as asked: it has no final norm of its tokens'):
            teacher(images, (4, 4), FEATURES)
    else:
        with torch.no_grad():
            expected = native.layernorm(hidden[0])
        assert relative(teacher(images, (4, 4), FEATURES).taps[1, 'features'], expected) < 1e-5


def test_init__no_memory_before_loading(save):
    _, folder = save('Dinov2Model')
    teacher = HuggingFaceTeacher(str(folder))
    assert {p.device.type for p in teacher.parameters()} == {'meta'}
    assert (teacher.spec.patch_size, teacher.spec.num_extra_tokens) == (16, 1)


def test_init__without_a_network(tmp_path):
    # The hub's own pauses between its attempts add up to 23 s.
    code = ('import time\ntime.sleep = lambda seconds: None\nfrom mmhdistill.models import HuggingFaceTeacher\n'
            "HuggingFaceTeacher('facebook/dinov2-base@main', name='dino')")
    env = {**os.environ, 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path)}
    env.pop('HF_HUB_CACHE', None)
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    url = 'http://127.0.0.1:9/facebook/dinov2-base/resolve/main/config.json'
    assert last.startswith(f"RuntimeError: config.json of teacher 'dino' cannot be fetched from {url} (")
    assert last.endswith('Without a network, fetch config.json elsewhere and give the folder that holds it: '
                         f'model.teachers.dino.model=FOLDER; the hub keeps its files in {tmp_path}/hub.')
