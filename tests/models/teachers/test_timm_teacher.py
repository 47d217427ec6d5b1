import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mmhdistill.models.teachers import TimmTeacher
from tests.helpers import IMAGENET, OTHER, log_messages, randomise

SMALL = dict(embed_dim=48, depth=2, num_heads=4)
EVERYTHING = {0: frozenset('qkv'), 1: frozenset('qkv') | {'hidden', 'features'}}
FEATURES = {1: frozenset({'features'})}
DINO = 'vit_base_patch16_224.dino'
SUPERVISED = 'vit_base_patch16_224.augreg_in21k'
BEIT = 'beit_base_patch16_224.in22k_ft_in22k'
DINOV3 = 'vit_small_patch16_dinov3.lvd1689m'
# Name -> extra tokens, side of the native grid, tensors without a classifier.
MODELS = {
    DINO: (1, 14, 30),
    SUPERVISED: (1, 14, 30),
    'vit_base_patch32_clip_224.openai': (1, 7, 31),
    'vit_base_patch16_siglip_224.webli': (0, 14, 42),
    'vit_small_patch14_reg4_dinov2.lvd142m': (5, 37, 35),
    'deit3_small_patch16_224.fb_in1k': (1, 14, 34),
    'deit_tiny_distilled_patch16_224.fb_in1k': (2, 14, 31),
    DINOV3: (5, 16, 32),
}


@pytest.fixture(scope='module')
def create():
    """timm's own models, small, with random weights."""
    import timm

    def make(name, **kwargs):
        torch.manual_seed(0)
        options = dict(dynamic_img_size=True, **SMALL) if name != BEIT else SMALL
        return randomise(timm.create_model(name, **options, **kwargs)).eval()

    return make


def write(state, path):
    save_file({name: x.contiguous() for name, x in state.items()}, path) if path.suffix == '.safetensors' \
        else torch.save(state, path)
    return path


def teacher_of(model, path, **kwargs):
    return TimmTeacher(model, checkpoint=str(path), model_args=SMALL, **kwargs)


def random_images(grid, patch, batch=2):
    return torch.randn(batch, 3, *(side * patch for side in grid), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def native_taps(model, images):
    """Blocks' outputs, the final norm's, and q, k, v recomputed from what each attention is given."""
    taps, handles = {}, []

    def attention(index):

        def hook(attn, args, kwargs, output):
            bias = attn.qkv.bias
            if bias is None and getattr(attn, 'q_bias', None) is not None:
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q, k, v = F.linear(args[0], attn.qkv.weight, bias).chunk(3, dim=-1)
            if kwargs.get('rope') is not None:
                taps[index, 'unrotated'] = q, k
                q, k = (rotate(x, kwargs['rope'], attn) for x in (q, k))
            taps.update({(index, 'q'): q, (index, 'k'): k, (index, 'v'): v})

        return hook

    for index, block in enumerate(model.blocks):
        handles.append(block.attn.register_forward_hook(attention(index), with_kwargs=True))
        handles.append(block.register_forward_hook(
            lambda _, __, out, index=index: taps.update({(index, 'hidden'): out})))
    taps[len(model.blocks) - 1, 'features'] = model.forward_features(images)
    for handle in handles:
        handle.remove()
    return taps


def rotate(x, rope, attn):
    """DINOv3's rotation: the two halves of a head's channels are the two coordinates, extra tokens stay."""
    assert attn.rotate_half
    x = x.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    extra, patches = x[:, :, :attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens:]
    sin, cos = rope.chunk(2, dim=-1)
    a, b = patches.chunk(2, dim=-1)
    turned = torch.cat([torch.cat([-b, a], dim=-1) * sin + patches * cos], dim=-1)
    return torch.cat([extra, turned], dim=2).transpose(1, 2).flatten(2)


def relative(found, expected):
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('native_size', [True, False])
@pytest.mark.parametrize('name', MODELS)
def test_forward__equals_timm(create, tmp_path, name, native_size):
    extra, side, tensors = MODELS[name]
    native = create(name)
    teacher = teacher_of(name, write(native.state_dict(), tmp_path / 'w.safetensors'))
    receipt = teacher.load()
    assert (receipt.matched, receipt.total) == (tensors, tensors)
    assert (teacher.spec.num_extra_tokens, teacher.spec.depth, teacher.spec.embed_dims, teacher.spec.num_heads) == \
        (extra, 2, 48, 4)
    grid = (side, side) if native_size else (5, 8)
    images = random_images(grid, teacher.spec.patch_size)
    out = teacher(images, grid, EVERYTHING)
    expected = native_taps(native, images)
    assert (out.grid, out.num_extra_tokens) == (grid, extra)
    assert {(layer, kind) for layer, kinds in EVERYTHING.items() for kind in kinds} == set(out.taps)
    errors = {key: relative(value, expected[key]) for key, value in out.taps.items()}
    assert max(errors.values()) < 1e-5, errors
    assert out.extra(1, 'features').shape == (2, extra, 48)
    assert out.patches(1, 'features').shape == (2, grid[0] * grid[1], 48)


def test_forward__rotary_embedding_is_in_q_and_k(create, tmp_path):
    native = create(DINOV3)
    teacher = teacher_of(DINOV3, write(native.state_dict(), tmp_path / 'w.pth'))
    teacher.load()
    images = random_images((5, 8), 16)
    out, expected = teacher(images, (5, 8), EVERYTHING).taps, native_taps(native, images)
    for layer in range(2):
        for kind, unrotated in zip('qk', expected[layer, 'unrotated']):
            assert relative(out[layer, kind], expected[layer, kind]) < 1e-5
            assert relative(out[layer, kind][:, 5:], unrotated[:, 5:]) > 0.1
            assert relative(out[layer, kind][:, :5], unrotated[:, :5]) < 1e-5


@pytest.mark.parametrize('student', [IMAGENET, OTHER, dict(mean=[127.5] * 3, std=[127.5] * 3)])
def test_forward__renormalises_as_timm_preprocesses(create, tmp_path, student):
    native = create('vit_base_patch32_clip_224.openai')
    cfg = native.pretrained_cfg
    assert cfg['mean'][0] == pytest.approx(0.48145466)
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    own = [torch.tensor(cfg[key]).view(3, 1, 1) for key in ('mean', 'std')]
    theirs = [torch.tensor(student[key]).view(3, 1, 1) for key in ('mean', 'std')]
    teacher = teacher_of('vit_base_patch32_clip_224.openai', write(native.state_dict(), tmp_path / 'w.pth'),
                         input_mean=student['mean'], input_std=student['std'])
    teacher.load()
    found = teacher((pixels * 255 - theirs[0]) / theirs[1], (7, 7), FEATURES).taps[1, 'features']
    with torch.no_grad():
        assert relative(found, native.forward_features((pixels - own[0]) / own[1])) < 1e-5
        assert relative(found, native.forward_features(pixels)) > 1e-2


@pytest.mark.parametrize('num_classes', [0, 7, 21843])
@pytest.mark.parametrize('file', ['w.safetensors', 'w.pth'])
def test_load__with_and_without_a_classifier(create, tmp_path, num_classes, file):
    native = create(SUPERVISED, num_classes=num_classes)
    path = write(native.state_dict(), tmp_path / file)
    teacher = teacher_of(SUPERVISED, path, name='sup')
    receipt = teacher.load()
    assert (receipt.matched, receipt.total, receipt.source) == (30, 30, str(path))
    assert receipt.unused == (['head.bias', 'head.weight'] if num_classes else [])
    assert receipt.mean == receipt.std == [127.5] * 3
    state = native.state_dict()
    assert [name for name, x in teacher.model.state_dict().items() if not torch.equal(x, state[name])] == []
    # timm's config would keep the tensors of the file alive.
    assert 'state_dict' not in teacher.model.pretrained_cfg
    text = str(receipt).splitlines()
    assert text[0].startswith("teacher 'sup': vit_base_patch16_224.augreg_in21k of timm ")
    assert text[0].endswith(' (licence apache-2.0)')
    assert f'tensors  30/30, timm format, float32; left aside: {"head.* (2)" if num_classes else "nothing"}' in text[3]


def test_load__entries_of_a_training_checkpoint(create, tmp_path):
    state = create(DINO).state_dict()
    torch.save(dict(epoch=3, arch='vit', state_dict=state), tmp_path / 'w.pth')
    receipt = teacher_of(DINO, tmp_path / 'w.pth').load()
    assert (receipt.entry, receipt.matched, receipt.unused) == ('state_dict', 30, ['epoch', 'arch'])


def test_load__half_precision_files(create, tmp_path):
    state = {name: x.half() for name, x in create(DINO).state_dict().items()}
    teacher = teacher_of(DINO, write(state, tmp_path / 'w.safetensors'))
    assert teacher.load().dtype == 'float16 in the file, float32 in memory'
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert torch.equal(teacher.model.blocks[0].attn.qkv.weight, state['blocks.0.attn.qkv.weight'].float())


def test_load__sha256(create, tmp_path):
    import hashlib
    path = write(create(DINO).state_dict(), tmp_path / 'w.pth')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    receipt = teacher_of(DINO, path, sha256=digest[:8]).load()
    assert (receipt.sha256, receipt.published) == (digest, True)
    assert teacher_of(DINO, path).load().published is None
    message = f'{path} has sha256 {digest}, and 0badc0de is expected: it is damaged, or another file. Give the right ' \
              'file, or correct the hash.'
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        teacher_of(DINO, path, sha256='0badc0de').load()


def _rename(state, name='blocks.1.attn.proj.weight'):
    return {('blocks.1.attn.out.weight' if key == name else key): x for key, x in state.items()}


def _cut(state, name='blocks.1.attn.proj.weight'):
    return {key: (x[:-1].clone() if key == name else x) for key, x in state.items()}


_SHAPE = r'1 of another shape \(blocks.1.attn.proj.weight is \(47, 48\) instead of \(48, 48\)\)'
# What timm says where it is strict, and what is said where it is not.
BROKEN = {
    'missing': (lambda state: {k: x for k, x in state.items() if k != 'blocks.1.attn.proj.weight'},
                r'.*Missing key\(s\) in state_dict: "blocks.1.attn.proj.weight".*',
                r'1 missing \(blocks.1.attn.proj.weight\), 0 unexpected \(\)'),
    'renamed': (_rename, r'.*Missing key\(s\).*Unexpected key\(s\) in state_dict: "blocks.1.attn.out.weight".*',
                r'1 missing \(blocks.1.attn.proj.weight\), 1 unexpected \(blocks.1.attn.out.weight\)'),
    'of another shape': (_cut, _SHAPE, _SHAPE),
    'one more layer': (lambda state: {**state, 'blocks.2.norm1.weight': torch.ones(48)},
                       r'.*Unexpected key\(s\) in state_dict: "blocks.2.norm1.weight".*',
                       r'0 missing \(\), 1 unexpected \(blocks.2.norm1.weight\)'),
}
# Published without classes, so that leaving them out changes nothing.
STRICT = (DINO, 'vit_base_patch16_siglip_224.webli', DINOV3)


@pytest.mark.parametrize('name', [DINO, SUPERVISED, 'vit_base_patch32_clip_224.openai',
                                  'vit_base_patch16_siglip_224.webli', 'deit3_small_patch16_224.fb_in1k', DINOV3])
@pytest.mark.parametrize('fault', BROKEN)
def test_load__refuses_a_file_that_does_not_fit(create, tmp_path, name, fault):
    """Also where timm would load only what fits, because the classes of the file are left out."""
    change, strict, lax = BROKEN[fault]
    path = write(change(create(name).state_dict()), tmp_path / 'w.safetensors')
    reason = strict if name in STRICT else lax
    assert_refused(teacher_of(name, path), rf"^{re.escape(str(path))} does not fit '{name}' of timm \({reason}\)\. "
                   'Nothing was loaded; give the file of this model, or the model of this file.$')


def assert_refused(teacher, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        teacher.load()
    assert '\n' not in str(caught.value)
    assert {p.device.type for p in teacher.model.parameters()} == {'meta'}
    assert teacher.receipt is None
    with pytest.raises(RuntimeError, match="^teacher 'teacher' has no weights yet"):
        teacher(random_images((2, 2), teacher.spec.patch_size), (2, 2), FEATURES)


@pytest.mark.parametrize('fault', ['missing', 'renamed'])
def test_load__refuses_a_missing_tensor_where_timm_is_not_strict(create, tmp_path, fault):
    # timm leaves the pooling head out of the file, and for its sake would take anything.
    name = 'vit_base_patch16_siglip_gap_224.webli'
    native = create(name)
    extra = {'attn_pool.latent': torch.ones(1, 1, 48)}
    path = write({**native.state_dict(), **extra}, tmp_path / 'whole.safetensors')
    assert teacher_of(name, path).load().unused == ['attn_pool.latent']
    path = write(BROKEN[fault][0]({**native.state_dict(), **extra}), tmp_path / 'w.safetensors')
    assert_refused(teacher_of(name, path), rf"^{re.escape(str(path))} does not fit '{name}' of timm "
                   rf'\({BROKEN[fault][2]}\)')


@pytest.mark.parametrize('own, other', [
    (DINO, 'vit_base_patch32_clip_224.openai'), (DINO, DINOV3), (SUPERVISED, DINOV3), (DINOV3, DINO),
    ('deit3_small_patch16_224.fb_in1k', SUPERVISED)])
def test_load__refuses_another_architecture(create, tmp_path, own, other):
    path = write(create(other).state_dict(), tmp_path / 'w.safetensors')
    assert_refused(teacher_of(own, path), rf"^{re.escape(str(path))} does not fit '{own}' of timm \(")


@pytest.mark.parametrize('file', ['w.safetensors', 'w.pth'])
def test_load__refuses_a_truncated_file(create, tmp_path, file):
    path = write(create(DINO).state_dict(), tmp_path / file)
    path.write_bytes(path.read_bytes()[:-5000])
    assert_refused(teacher_of(DINO, path), rf'^weight file {re.escape(str(path))} cannot be read: it is damaged')


class Payload:

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker), )


def test_load__refuses_code(create, tmp_path):
    torch.save(dict(state_dict=create(DINO).state_dict(), extra=Payload(tmp_path / 'ran')), tmp_path / 'w.pth')
    assert_refused(teacher_of(DINO, tmp_path / 'w.pth'),
                   rf'^weight file {re.escape(str(tmp_path))}/w.pth cannot be read.*it asks for posix.mkdir')
    assert not (tmp_path / 'ran').exists()


def test_load__refuses_a_file_that_is_not_there(tmp_path):
    assert_refused(teacher_of(DINO, tmp_path / 'w.pth'), rf'^{re.escape(str(tmp_path))}/w.pth does not exist: give the '
                   r'path of an existing file\.$', FileNotFoundError)


def test_init__no_memory_before_loading():
    teacher = TimmTeacher('vit_giant_patch14_dinov2.lvd142m')
    assert {p.device.type for p in teacher.parameters()} == {'meta'}
    assert (teacher.spec.embed_dims, teacher.spec.depth, teacher.spec.num_heads) == (1536, 40, 24)
    assert sum(p.numel() for p in teacher.parameters()) == 1_136_479_232
    assert teacher.state_dict().keys() == teacher.model.state_dict(prefix='model.').keys()


def test_init__random_weights_for_tests():
    teacher = TimmTeacher(DINO, checkpoint=None, model_args=SMALL)
    with log_messages() as messages:
        receipt = teacher.load()
    assert messages == ["teacher 'teacher' has random weights (checkpoint=None): good for trying things out only"]
    assert (receipt.source, receipt.matched, receipt.total, receipt.sha256) == ('random weights', 0, 30, None)
    assert (receipt.model, receipt.mean) == (DINO, pytest.approx(IMAGENET['mean']))
    out = teacher(random_images((2, 3), 16), (2, 3), FEATURES).taps[1, 'features']
    assert out.std() > 0.5
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize('name, args, reason', [
    ('swin_tiny_patch4_window7_224.ms_in1k', {},
     'it is no plain ViT, with patch_embed of one patch size and blocks'),
    ('resnet18.a1_in1k', {}, 'it is no plain ViT, with patch_embed of one patch size and blocks'),
    ('vit_tiny_patch16_224', dict(patch_size=(16, 8)),
     r'its patches are \(16, 8\), and square ones are expected'),
])
def test_init__models_that_are_no_plain_vit_are_refused(name, args, reason):
    with pytest.raises(ValueError, match=rf"^teacher 'x', {name} of timm, cannot be read as asked: {reason}\.$"):
        TimmTeacher(name, name='x', model_args=args)


def test_beit__blocks_can_be_read_and_its_relations_are_refused(create, tmp_path):
    """Its relative position bias is no part of q and k."""
    native = create(BEIT)
    teacher = teacher_of(BEIT, write(native.state_dict(), tmp_path / 'w.safetensors'))
    assert teacher.load().matched == len(native.state_dict()) - 2
    images = random_images((14, 14), 16)
    hidden = []
    native.blocks[1].register_forward_hook(lambda _, __, out: hidden.append(out))
    with torch.no_grad():
        native.forward_features(images)
    found = teacher(images, (14, 14), {1: frozenset({'hidden'})}).taps[1, 'hidden']
    assert relative(found, hidden[0]) < 1e-5
    for taps in ({0: frozenset('q')}, {1: frozenset('kv')}):
        with pytest.raises(ValueError, match=rf"^teacher 'teacher', {BEIT} of timm, cannot be read as asked: its "
                                             'attention adds a mask or a position bias'):
            teacher.describe_run((14, 14), taps)


@pytest.mark.parametrize('name', [BEIT, 'vit_betwixt_patch16_rope_reg4_gap_256.sbb_in1k',
                                  'eva02_tiny_patch14_224.mim_in22k'])
def test_forward__features_of_a_model_that_pools_before_its_norm_are_refused(name):
    teacher = TimmTeacher(name, checkpoint=None, model_args=SMALL)
    grid = tuple(side // teacher.spec.patch_size for side in teacher.model.pretrained_cfg['input_size'][1:])
    images = random_images(grid, teacher.spec.patch_size, batch=1)
    assert teacher(images, grid, {1: frozenset({'hidden'})}).taps[1, 'hidden'].std() > 0
    with pytest.raises(ValueError, match=rf"^teacher 'teacher', {name} of timm, cannot be read as asked: it has no "
                                         'final norm of its tokens'):
        teacher(images, grid, FEATURES)


def test_load__a_name_without_weights_needs_a_file():
    teacher = TimmTeacher('vit_base_patch16_224', model_args=SMALL)
    teacher._cfg = {**teacher._cfg, 'hf_hub_id': None}
    with pytest.raises(ValueError, match="^timm names no weights for 'vit_base_patch16_224': give its tag"):
        teacher.load()


def test_load__auto_takes_what_the_hub_has_fetched_before(create, tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    state = create(DINO).state_dict()
    folder = tmp_path / 'models--timm--vit_base_patch16_224.dino'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs/main').write_text('c0ffee')
    (folder / 'snapshots/c0ffee').mkdir(parents=True)
    path = write(state, folder / 'snapshots/c0ffee/model.safetensors')
    teacher = TimmTeacher(DINO, model_args=SMALL)
    receipt = teacher.load()
    assert (receipt.source, receipt.matched) == (str(path), 30)
    assert torch.equal(teacher.model.pos_embed, state['pos_embed'])


def test_load__auto_without_a_network(tmp_path):
    # The hub's own pauses between its attempts add up to 23 s.
    code = ('import time\ntime.sleep = lambda seconds: None\nfrom mmhdistill.models import TimmTeacher\n'
            f"TimmTeacher('{DINO}', name='dino', model_args={SMALL}).load()")
    env = {**os.environ, 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path)}
    env.pop('HF_HUB_CACHE', None)
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    url = 'http://127.0.0.1:9/timm/vit_base_patch16_224.dino/resolve/main/model.safetensors'
    assert last.startswith(f"RuntimeError: model.safetensors of teacher 'dino' cannot be fetched from {url} (")
    assert last.endswith('Without a network, fetch model.safetensors elsewhere and give its path: '
                         f'model.teachers.dino.checkpoint=FILE; the hub keeps its files in {tmp_path}/hub.')
