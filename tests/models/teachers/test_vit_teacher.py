import hashlib
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from mmhdistill.models.teachers import CARDS, ViTTeacher, find_card
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
CURE = 'Nothing was loaded; give the file of this card, or the card of this file.'


def random_state(**card):
    """Random weights under the names of mmpretrain."""
    return randomise(ViTTeacher(tiny_card(**card), checkpoint=None)).vit.state_dict()


def features(teacher, images=None, grid=GRID):
    return teacher(random_images() if images is None else images, grid, FEATURES).taps[2, 'features']


def digest(path, algorithm='sha256'):
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


class Payload:
    """Makes a folder when it is unpickled by what runs code."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder), )


@pytest.fixture
def checkpoint(tmp_path):
    """A file that fits the tiny card, and its content."""
    state = random_state()
    torch.save(state, tmp_path / 'w.pth')
    return tmp_path / 'w.pth', state


def resaved(checkpoint, change):
    path, state = checkpoint
    change(state)
    torch.save(state, path)
    return ViTTeacher(tiny_card(), checkpoint=str(path), name='mae')


def refused(teacher, error=ValueError):
    """Loading fails, a second time too, and the teacher stays without weights and says so; returns the message."""
    messages = []
    for _ in range(2):
        with pytest.raises(error) as caught:
            teacher.load()
        messages.append(str(caught.value))
        assert {p.device.type for p in teacher.vit.parameters()} == {'meta'}
        assert len(list(teacher.vit.parameters())) >= 40
        assert teacher.receipt is None
        with pytest.raises(RuntimeError, match=rf"teacher '{teacher.name}' has no weights yet: call init_weights\(\)"):
            features(teacher)
    assert messages[0] == messages[1]
    return messages[0]


# Without weights, and with random ones.


def test_init__without_memory_until_loaded(checkpoint):
    path, state = checkpoint
    teacher = ViTTeacher(tiny_card(), checkpoint=str(path), name='mae')
    assert {x.device.type for x in teacher.state_dict().values()} == {'meta'}
    assert teacher.receipt is None
    with pytest.raises(RuntimeError) as caught:
        features(teacher)
    assert str(caught.value) == ("teacher 'mae' has no weights yet: call init_weights() on the model first (a Runner "
                                 'does), or build it with checkpoint=None for random weights.')
    assert teacher.load() is teacher.receipt
    assert_unchanged(teacher.vit, state)
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == []
    assert [name for name, module in teacher.named_modules() if module.training] == []


def test_load__random_weights_are_kept_and_told():
    teacher = ViTTeacher(tiny_card(), checkpoint=None, name='mae')
    before = snapshot(teacher)
    with log_messages() as messages:
        receipt = teacher.load()
        assert teacher.load() is receipt is teacher.receipt
    assert_unchanged(teacher, before)
    assert receipt.as_dict() == dict(
        name='mae', model='tiny', source='random weights', matched=0, total=42, **IMAGENET, format='', prefix='',
        entry='', unused=[], sha256=None, published=None, dtype='float32', licence='', run={}, role='teacher')
    assert messages == ["teacher 'mae' has random weights (checkpoint=None): good for trying things out only"]
    assert features(teacher).std() > 0.1


def test_load__once(checkpoint):
    path, _ = checkpoint
    teacher = ViTTeacher(tiny_card(), checkpoint=str(path))
    receipt = teacher.load()
    before = snapshot(teacher)
    path.unlink()
    assert teacher.load() is receipt
    assert_unchanged(teacher, before)


def test_load__receipt(checkpoint):
    path, _ = checkpoint
    teacher = ViTTeacher(tiny_card(licence='CC-BY-NC-4.0'), checkpoint=str(path), name='mae', sha256=digest(path)[:8])
    assert teacher.load().as_dict() == dict(
        name='mae', model='tiny', source=str(path), matched=42, total=42, **IMAGENET, format='mmpretrain', prefix='',
        entry='', unused=[], sha256=digest(path), published=True, dtype='float32', licence='CC-BY-NC-4.0', run={},
        role='teacher')


def test_load__receipt_of_a_part_of_a_training_file(tmp_path):
    path = tmp_path / 'w.pth'
    state = {f'backbone.{name}': x.half() for name, x in random_state().items()}
    other = {'head.fc.weight': torch.ones(2), 'backbone.mask_token': torch.ones(1, 1, 32)}
    torch.save(dict(optimizer={}, ema=dict(state_dict=state | other)), path)
    receipt = ViTTeacher(tiny_card(), checkpoint=str(path), entry='ema').load()
    assert (receipt.entry, receipt.prefix, receipt.published) == ('ema.state_dict', 'backbone.', None)
    assert receipt.unused == ['backbone.mask_token', 'head.fc.weight', 'optimizer']
    assert receipt.dtype == 'float16 in the file, float32 in memory'


# Where the weights go.


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('before', [True, False])
def test_to__weights_follow_before_and_after_loading(before, dtype, checkpoint):
    path, state = checkpoint
    teacher = ViTTeacher(tiny_card(**OTHER), checkpoint=str(path), input_mean=IMAGENET['mean'],
                         input_std=IMAGENET['std'])
    if before:
        teacher.to(dtype)
        assert {p.device.type for p in teacher.vit.parameters()} == {'meta'}
    receipt = teacher.load()
    if not before:
        teacher.to(dtype)
    assert_unchanged(teacher.vit, {name: x.to(dtype) for name, x in state.items()})
    assert {p.dtype for p in teacher.vit.parameters()} == {dtype}
    assert features(teacher, random_images().to(dtype)).dtype == dtype
    name = str(dtype).removeprefix('torch.')
    assert receipt.dtype == (f'float32 in the file, {name} in memory' if before else 'float32')


@pytest.mark.parametrize('before', [True, False])
def test_to__another_device_before_and_after_loading(before, checkpoint):
    teacher = ViTTeacher(tiny_card(), checkpoint=str(checkpoint[0]))
    # Weights that are not there yet cannot be moved, and need not be.
    teacher.cpu()
    if before:
        teacher.to('meta')
    teacher.load()
    assert {p.device.type for p in teacher.vit.parameters()} == {'meta' if before else 'cpu'}
    teacher.to('meta')
    out = features(teacher, random_images().to('meta'))
    assert (out.device.type, out.shape) == ('meta', (2, 17, 32))


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_load__weights_do_not_change_with_the_file(kind, tmp_path):
    state, path = random_state(), tmp_path / ('w.safetensors' if kind == 'safetensors' else 'w.pth')
    if kind == 'safetensors':
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == 'zip')
    teacher = ViTTeacher(tiny_card(), checkpoint=str(path))
    teacher.load()
    with open(path, 'r+b') as file:
        file.write(bytes(path.stat().st_size))
    assert_unchanged(teacher.vit, state)


def test_load__a_part_of_a_larger_tensor_is_a_copy_of_its_own(tmp_path):
    # The file keeps all tensors in one storage.
    state = random_state()
    everything = torch.cat([x.flatten() for x in state.values()])
    parts = everything.split([x.numel() for x in state.values()])
    torch.save({name: part.view(x.shape) for (name, x), part in zip(state.items(), parts)}, tmp_path / 'w.pth')
    teacher = ViTTeacher(tiny_card(), checkpoint=str(tmp_path / 'w.pth'))
    teacher.load()
    assert_unchanged(teacher.vit, state)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in teacher.vit.parameters())


def test_load__a_path_of_the_home_folder(checkpoint, monkeypatch):
    path, state = checkpoint
    monkeypatch.setenv('HOME', str(path.parent))
    teacher = ViTTeacher(tiny_card(), checkpoint='~/w.pth')
    assert teacher.load().source == str(path)
    assert_unchanged(teacher.vit, state)


# What is refused.


def test_load__refuses_a_missing_tensor(checkpoint):
    teacher = resaved(checkpoint, lambda state: state.pop('layers.1.ffn.layers.1.bias'))
    assert refused(teacher) == (f"{checkpoint[0]} does not fit card 'tiny' (3 layers of width 32, patch 8): 1 missing "
                                f'(layers.1.ffn.layers.1.bias). {CURE}')


def test_load__refuses_an_unexpected_tensor(checkpoint):
    teacher = resaved(checkpoint, lambda state: state.update({'layers.0.attn.gamma': torch.ones(32)}))
    assert refused(teacher) == (f"{checkpoint[0]} does not fit card 'tiny' (3 layers of width 32, patch 8): "
                                f'1 unexpected (layers.0.attn.gamma). {CURE}')


def test_load__refuses_a_renamed_tensor(checkpoint):
    teacher = resaved(checkpoint, lambda state: state.update({'layers.2.ln3.bias': state.pop('layers.2.ln2.bias')}))
    assert refused(teacher) == (f"{checkpoint[0]} does not fit card 'tiny' (3 layers of width 32, patch 8): 1 missing "
                                f'(layers.2.ln2.bias); 1 unexpected (layers.2.ln3.bias). {CURE}')


@pytest.mark.parametrize('key, shape, expected', [
    ('pos_embed', (1, 26, 32), '(1, 17, 32)'),
    ('cls_token', (1, 1, 1), '(1, 1, 32)'),  # it would broadcast
    ('layers.0.attn.qkv.weight', (32, 96), '(96, 32)'),
    ('layers.2.ln1.bias', (), '(32,)'),
])
def test_load__refuses_another_shape(key, shape, expected, checkpoint):
    teacher = resaved(checkpoint, lambda state: state.update({key: torch.ones(shape)}))
    assert refused(teacher) == (f"{checkpoint[0]} does not fit card 'tiny' (3 layers of width 32, patch 8): 1 of "
                                f'another shape ({key} is {shape} instead of {expected}). {CURE}')


def test_load__refuses_a_token_without_channels(checkpoint):
    message = refused(resaved(checkpoint, lambda state: state.update(cls_token=torch.tensor(1.0))))
    assert f'(cls_token is of shapes () instead of (1, 1, 32)). {CURE}' in message


def test_load__refuses_a_model_of_another_size(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(random_state(depth=4, embed_dims=48), path)
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(path)))
    # 12 tensors of the fourth layer; of the 42 others all have the width in their shape.
    assert re.fullmatch(re.escape(f"{path} does not fit card 'tiny' (3 layers of width 32, patch 8): 12 unexpected ")
                        + r'\(layers\.3\.\S+, layers\.3\.\S+, layers\.3\.\S+, \.\.\.\); 42 of another shape '
                        + r'\(cls_token is \(1, 1, 48\) instead of \(1, 1, 32\), .*, \.\.\.\)\. ' + re.escape(CURE),
                        message)


@pytest.mark.parametrize('pre_norm', [True, False])
def test_load__refuses_a_model_with_another_pre_norm(pre_norm, tmp_path):
    torch.save(random_state(pre_norm=not pre_norm), tmp_path / 'w.pth')
    message = refused(ViTTeacher(tiny_card(pre_norm=pre_norm), checkpoint=str(tmp_path / 'w.pth')))
    bias, norm = '(patch_embed.projection.bias)', '(pre_norm.bias, pre_norm.weight)'
    expected = (f'2 missing (pre_norm.weight, pre_norm.bias); 1 unexpected {bias}.' if pre_norm
                else f'1 missing {bias}; 2 unexpected {norm}.')
    assert f' patch 8): {expected} {CURE}' in message


def test_load__refuses_another_architecture(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save({'layer1.0.conv1.weight': torch.ones(1), 'fc.bias': torch.ones(1)}, path)
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(path)))
    assert message.startswith(f'{path} is in no known format: expected the keys of one of mmpretrain, timm, ')
    assert message.endswith('found layer1.0.conv1.weight, fc.bias, ...')


def test_load__refuses_to_choose_among_several_models(tmp_path):
    path, state = tmp_path / 'w.pth', random_state()
    shifted = {name: x + 1 for name, x in state.items()}
    torch.save({f'{branch}.{name}': x for branch, part in (('online', state), ('target', shifted))
                for name, x in part.items()}, path)
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(path)))
    assert message == f'{path} holds 2 ViTs, under online., target.: choose one with prefix=...'
    teacher = ViTTeacher(tiny_card(), checkpoint=str(path), prefix='target.')
    receipt = teacher.load()
    assert_unchanged(teacher.vit, shifted)
    assert (receipt.prefix, len(receipt.unused)) == ('target.', 42)
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(path), prefix='other.'))
    assert message == (f"{path} holds no ViT under the prefix 'other.', but under 'online.', 'target.': correct "
                       'prefix=...')


def test_load__refuses_a_truncated_file(checkpoint):
    path, _ = checkpoint
    path.write_bytes(path.read_bytes()[:-1000])
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(path)))
    assert message.startswith(f'weight file {path} cannot be read: it is damaged, or ')
    assert message.endswith('Fetch it again, or save its state_dict alone with torch.save.')


def test_load__refuses_a_payload_and_does_not_run_it(checkpoint):
    path, state = checkpoint
    proof = path.with_name('ran')
    torch.save(dict(state_dict=state, extra=Payload(proof)), path)
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(path)))
    assert not proof.exists()
    assert message.startswith(f'weight file {path} cannot be read: it is damaged, or holds Python objects that could '
                              'run code, which are refused (it asks for posix.mkdir')
    # It would have: what runs code does make the folder.
    torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize('given', ['argument', 'card'])
def test_load__refuses_another_sha256(given, checkpoint, cache):
    path, _ = checkpoint
    if given == 'argument':
        teacher = ViTTeacher(tiny_card(), checkpoint=str(path), sha256='0badc0de')
    else:
        cache.mkdir()
        path = path.rename(cache / 'w.pth')
        teacher = ViTTeacher(tiny_card(url='http://127.0.0.1:9/w.pth', sha256='0badc0de'))
    cure = 'Give the right file, or correct the hash.' if given == 'argument' else 'Delete it to fetch it again.'
    assert refused(teacher) == (f'{path} has sha256 {digest(path)}, and 0badc0de is expected: it is damaged, or '
                                f'another file. {cure}')


def test_load__refuses_another_md5(checkpoint, cache):
    cache.mkdir()
    path = checkpoint[0].rename(cache / 'w.pth')
    right = dict(url='http://127.0.0.1:9/w.pth', sha256=digest(path)[:8])
    assert refused(ViTTeacher(tiny_card(**right, md5='0bad'))) == (
        f'{path} has md5 {digest(path, "md5")}, and 0bad is expected: it is damaged, or another file. Delete it to '
        'fetch it again.')
    assert ViTTeacher(tiny_card(**right, md5=digest(path, 'md5')[:6])).load().published is True


def test_load__a_given_sha256_goes_before_the_cards(checkpoint, cache):
    cache.mkdir()
    path = checkpoint[0].rename(cache / 'w.pth')
    card = tiny_card(url='http://127.0.0.1:9/w.pth', sha256='0badc0de', md5='0bad')
    assert ViTTeacher(card, sha256=digest(path)).load().published is True


@pytest.mark.parametrize('hashes, published', [
    (lambda path: dict(sha256=digest(path), md5=digest(path, 'md5')[:6]), True),
    (lambda path: dict(md5=digest(path, 'md5')[:6]), True),
    (lambda path: dict(sha256='0badc0de'), False),
    (lambda path: dict(sha256=digest(path), md5='0bad'), False),
    (lambda path: {}, None),
])
def test_load__a_file_of_ones_own_may_be_another_than_the_cards(hashes, published, checkpoint):
    path, state = checkpoint
    teacher = ViTTeacher(tiny_card(**hashes(path)), checkpoint=str(path))
    receipt = teacher.load()
    assert (receipt.sha256, receipt.published) == (digest(path), published)
    assert_unchanged(teacher.vit, state)


@pytest.fixture
def another(checkpoint, monkeypatch):
    """A shipped card, whose file :func:`checkpoint` is."""
    monkeypatch.setitem(CARDS, 'another', find_card(tiny_card(name='another', sha256=digest(checkpoint[0])[:8])))
    return CARDS['another']


@pytest.mark.parametrize('hashes', [dict(sha256='0badc0de'), dict(md5='0bad'), {}])
def test_load__refuses_the_file_of_another_card(hashes, checkpoint, another, monkeypatch):
    """By the name of that card: the shapes may be the same, and the normalisation another."""
    card = find_card(tiny_card(**hashes))
    monkeypatch.setitem(CARDS, 'tiny', card)
    assert refused(ViTTeacher(card, checkpoint=str(checkpoint[0]))) == (
        f"{checkpoint[0]} is the file of card 'another', and not of 'tiny': give the file of this card, or that card.")
    assert ViTTeacher(another, checkpoint=str(checkpoint[0])).load().published is True


def test_load__a_card_of_ones_own_may_describe_the_file_of_a_shipped_one(checkpoint, another):
    path, state = checkpoint
    # Without a hash it claims nothing else; with the file's hash it is the user who vouches.
    for card, kwargs, published in ((tiny_card(), {}, None), (tiny_card(sha256='0badc0de'),
                                                              dict(sha256=digest(path)[:10]), True)):
        teacher = ViTTeacher(card, checkpoint=str(path), **kwargs)
        assert teacher.load().published is published
        assert_unchanged(teacher.vit, state)


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_load__refuses_tensors_that_are_not_of_floating_point(dtype, checkpoint):
    def change(state):
        for key in ('cls_token', 'ln1.weight'):
            state[key] = state[key].to(dtype)

    name = str(dtype)
    assert refused(resaved(checkpoint, change)) == (
        f"{checkpoint[0]} does not fit card 'tiny' (3 layers of width 32, patch 8): 2 not of floating point (cls_token "
        f'is {name}, ln1.weight is {name}). {CURE}')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_load__refuses_weights_that_are_not_finite(dtype, value, checkpoint):
    def change(state):
        for key in list(state):
            state[key] = state[key].to(dtype)
        state['layers.1.attn.qkv.weight'][70, 3] = value

    assert refused(resaved(checkpoint, change)) == (
        f"{checkpoint[0]} does not fit card 'tiny' (3 layers of width 32, patch 8): 1 not finite "
        f'(layers.1.attn.qkv.weight). {CURE}')


def test_load__what_is_left_aside_may_be_anything(checkpoint):
    path, state = checkpoint
    torch.save({'model': {**state, 'mask_token': torch.tensor(float('nan')), 'head.weight': torch.tensor(3)}}, path)
    teacher = ViTTeacher(tiny_card(), checkpoint=str(path))
    with pytest.raises(ValueError, match=r'1 unexpected \(head\.weight\)'):
        teacher.load()
    prefixed = {f'backbone.{name}': x for name, x in state.items()}
    torch.save({**prefixed, 'backbone.mask_token': torch.tensor(float('nan')), 'head.weight': torch.tensor(3)}, path)
    assert teacher.load().unused == ['backbone.mask_token', 'head.weight']
    assert_unchanged(teacher.vit, state)


def test_load__refuses_a_missing_file(tmp_path):
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(tmp_path / 'no.pth')), FileNotFoundError)
    assert message == f'{tmp_path / "no.pth"} does not exist: give the path of an existing file.'
    message = refused(ViTTeacher(tiny_card(), checkpoint=str(tmp_path)), FileNotFoundError)
    assert message == f'{tmp_path} is a folder: give the path of a file in it.'


def test_load__auto_without_url():
    message = refused(ViTTeacher(tiny_card(), name='mine'))
    assert message == ("card 'tiny' names no URL: set checkpoint of teacher 'mine' to the path of its weight file.")


# What is fetched.


def test_load__auto_fetches_the_file_of_the_card(checkpoint, server, cache):
    path, state = checkpoint
    (server.folder / 'w.pth').write_bytes(path.read_bytes())
    teacher = ViTTeacher(tiny_card(url=f'{server.url}/w.pth', sha256=digest(path)[:8]))
    receipt = teacher.load()
    assert_unchanged(teacher.vit, state)
    assert server.requested == ['/w.pth']
    assert (receipt.source, receipt.published) == (str(cache / 'w.pth'), True)


def test_load__url_as_checkpoint(checkpoint, server, cache):
    path, state = checkpoint
    (server.folder / 'w.pth').write_bytes(path.read_bytes())
    teacher = ViTTeacher(tiny_card(), checkpoint=f'{server.url}/w.pth')
    assert teacher.load().published is None
    assert_unchanged(teacher.vit, state)


def test_load__a_fetched_file_of_another_sha256_is_not_kept(checkpoint, server, cache):
    (server.folder / 'w.pth').write_bytes(checkpoint[0].read_bytes())
    message = refused(ViTTeacher(tiny_card(url=f'{server.url}/w.pth', sha256='0badc0de')), RuntimeError)
    assert message.startswith(f'the file at {server.url}/w.pth has sha256 {digest(checkpoint[0])}, and 0badc0de '
                              'is expected: it is damaged, or another file. It was not kept. ')
    assert [file.name for file in cache.iterdir() if file.suffix == '.pth'] == []
