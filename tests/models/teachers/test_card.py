import dataclasses
import math
import re
from urllib.parse import urlparse

import pytest
import torch
from mmpretrain.registry import MODELS as MMPRETRAIN
from torch.testing import assert_close

from mmhdistill.models.teachers import CARDS, TeacherCard, ViTTeacher, find_card
from mmhdistill.models.teachers.card import check_normalisation
from tests.helpers import tiny_card

WIDTHS = dict(ti=192, s=384, b=768, l=1024, h=1280, so400m=1152, g=1536)
HOSTS = {'dl.fbaipublicfiles.com', 'openaipublic.azureedge.net', 'huggingface.co', 'github.com',
         'lf3-nlp-opensource.bytetos.com'}


@pytest.fixture(params=CARDS)
def card(request):
    return CARDS[request.param]


def test_cards__are_found_by_their_own_names():
    assert len(CARDS) >= 40
    assert [card.name for card in CARDS.values()] == list(CARDS)
    assert len({card.url for card in CARDS.values()}) == len(CARDS)


def test_cards__name_carries_size_and_patch(card):
    size, patch, image = re.search(r'-vit-(\w+)-p(\d+)(?:-(\d+))?(?:-|$)', card.name).groups()
    assert (card.embed_dims, card.patch_size) == (WIDTHS[size], int(patch))
    if image:
        assert card.img_size == int(image)


def test_cards__size_and_patch_are_those_of_the_url(card):
    path = urlparse(card.url).path.lower()
    patches = re.findall(r'(?:patch|[lb][-_/]|small|base|vit[sblg]_?)(8|14|16|32)(?!\d)', path)
    assert set(patches) <= {str(card.patch_size)}
    sizes = {size for size, word in (('ti', r'tiny'), ('s', r'small|vit-s|vits14'), ('b', r'base|vit[-_]?b'),
                                     ('l', r'large|vit[-_]?l'), ('h', 'huge'), ('so400m', 'so400m'),
                                     ('g', 'vitg14')) if re.search(word, path)}
    assert sizes == {re.search(r'-vit-(\w+?)-p', card.name)[1]}


def test_cards__heads_divide_the_width(card):
    assert card.embed_dims % card.num_heads == 0
    assert card.embed_dims // card.num_heads in (32, 64, 72, 80)


def test_cards__files_are_at_their_authors_or_a_public_hub(card):
    url = urlparse(card.url)
    assert (url.scheme, url.query) == ('https', '')
    assert url.netloc in HOSTS
    assert 'openmmlab' not in card.url
    if url.netloc == 'huggingface.co':
        assert '/resolve/' in url.path


def test_cards__hashes_are_whole_or_the_beginning_that_torch_hub_prints(card):
    assert card.sha256 is None or re.fullmatch(r'[0-9a-f]{64}|[0-9a-f]{8}', card.sha256)
    assert card.md5 is None or re.fullmatch(r'[0-9a-f]{6,32}', card.md5)


def test_cards__hashes_in_the_url_are_those_of_the_card(card):
    in_url = re.findall(r'(?<=[-/])([0-9a-f]{64}|[0-9a-f]{8})(?=[./])', card.url)
    if card.name.startswith(('deit-', 'clip-', 'openclip-vit-b-p16-laion400m', 'openclip-vit-l-p14-laion400m')):
        assert in_url == [card.sha256]
    else:
        assert in_url == []


def test_cards__hub_revisions_are_pinned_where_a_whole_hash_is(card):
    revision = re.search(r'google/.*/resolve/([^/]+)/', card.url)
    assert revision is None or re.fullmatch(r'[0-9a-f]{40}', revision[1])


def test_cards__no_hash_stands_for_two_files():
    for kind in ('sha256', 'md5'):
        hashes = [getattr(card, kind) for card in CARDS.values() if getattr(card, kind)]
        assert len(set(hashes)) == len(hashes)


def test_cards__pixels_in_0_to_255_map_to_about_unit_range(card):
    ends = [[(value - mean) / std for value in (0, 255)] for mean, std in zip(card.mean, card.std)]
    assert all(-2.2 < low <= -1 and 1 <= high < 2.7 for low, high in ends)


def test_cards__facts_that_follow_from_the_format(card):
    clip = card.format == 'openai-clip'
    assert card.pre_norm == clip
    assert card.norm_eps == (1e-5 if clip else 1e-6)
    assert card.class_token == (card.format != 'huggingface-clip')
    assert card.layer_scale == card.name.startswith(('dinov2', 'deit3'))
    # Only OpenAI's own models have the quick approximation: open_clip's releases chosen here do not.
    assert (card.activation == 'quick_gelu') == (urlparse(card.url).netloc == 'openaipublic.azureedge.net')
    assert card.licence


@pytest.mark.parametrize('name', ['dinov2-reg4-vit-s-p14', 'siglip-vit-so400m-p14-384', 'mocov3-vit-s-p16',
                                  'dinov2-vit-g-p14'])
def test_build__tensors_of_a_card(name):
    card = CARDS[name]
    with torch.device('meta'):
        vit = card.build()
    patches = (card.img_size // card.patch_size)**2
    assert vit.pos_embed.shape == (1, card.class_token + card.registers + patches, card.embed_dims)
    tokens = None if vit.cls_token is None else tuple(vit.cls_token.shape)
    assert tokens == ((1, 1 + card.registers, card.embed_dims) if card.class_token else None)
    hidden = {'dinov2-vit-g-p14': 4096, 'siglip-vit-so400m-p14-384': 4304}.get(name, 4 * card.embed_dims)
    ffn = vit.layers[-1].ffn
    widths = (ffn.w3.weight.shape if card.swiglu else ffn.layers[1].weight.shape)
    assert widths == (card.embed_dims, hidden)


@pytest.mark.parametrize('size, patch, grid', [(384, 14, (27, 27)), (518, 14, (37, 37)), (224, 16, (14, 14))])
def test_grid__of_whole_patches(size, patch, grid):
    card = find_card(tiny_card(img_size=size, patch_size=patch))
    assert card.grid == grid
    assert card.backbone()['img_size'] == grid[0] * patch


def test_positions__extra_tokens_stay_and_patches_are_resampled():
    card = find_card(tiny_card(registers=2, resampling='bilinear-corners'))
    pos_embed = torch.randn(1, 3 + 16, 8, generator=torch.Generator().manual_seed(0))
    found = card.positions(pos_embed, (7, 5))
    assert found.shape == (1, 3 + 35, 8)
    assert torch.equal(found[:, :3], pos_embed[:, :3])
    # The four corners are kept: first and last of the first and of the last row.
    assert_close(found[:, [3, 3 + 4, 3 + 30, 3 + 34]], pos_embed[:, [3, 3 + 3, 3 + 12, 3 + 15]], rtol=0, atol=1e-6)
    assert card.positions(pos_embed, (4, 4)) is pos_embed


@pytest.mark.parametrize('activation, at_minus_one', [
    ('gelu', -(1 + math.erf(-1 / math.sqrt(2))) / 2),
    ('gelu_tanh', -(1 + math.tanh(-math.sqrt(2 / math.pi) * 1.044715)) / 2),
    ('quick_gelu', -1 / (1 + math.exp(1.702))),
])
def test_build__activation(activation, at_minus_one):
    vit = MMPRETRAIN.build(find_card(tiny_card(activation=activation)).backbone())
    found = [layer.ffn.layers[0][1](torch.tensor(-1.0)).item() for layer in vit.layers]
    assert found == pytest.approx([at_minus_one] * 3, abs=1e-7)


def test_build__norm_eps_of_every_norm():
    vit = find_card(tiny_card(norm_eps=1e-3, pre_norm=True)).build()
    norms = [module.eps for module in vit.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms == [1e-3] * (3 * 2 + 2)


@pytest.mark.parametrize('field, value, message', [
    ('activation', 'relu', "teacher card 'tiny' has activation 'relu': choose one of gelu, gelu_tanh, quick_gelu."),
    ('resampling', 'nearest', "teacher card 'tiny' has resampling 'nearest': choose one of bicubic, "
     'bicubic-antialias, bicubic-offset, bilinear-corners, sincos.'),
])
def test_find_card__unknown_choice(field, value, message):
    with pytest.raises(ValueError) as caught:
        find_card(tiny_card(**{field: value}))
    assert str(caught.value) == message


@pytest.mark.parametrize('field', ['embed_dims', 'depth', 'num_heads', 'patch_size', 'img_size'])
@pytest.mark.parametrize('value', [0, -16, 16.0, '16', None, (16, 16)])
def test_find_card__size_that_is_no_whole_number(field, value):
    with pytest.raises(ValueError) as caught:
        find_card(tiny_card(**{field: value}))
    assert str(caught.value) == f"teacher card 'tiny' has {field} {value!r}: give a whole number."


def test_find_card__heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError) as caught:
        find_card(tiny_card(num_heads=5))
    assert str(caught.value) == "teacher card 'tiny' has 5 heads, which do not divide its width of 32."


def test_find_card__image_smaller_than_a_patch():
    with pytest.raises(ValueError) as caught:
        find_card(tiny_card(patch_size=33))
    assert str(caught.value) == "teacher card 'tiny' has images of 32 px, smaller than one patch of 33 px."
    assert find_card(tiny_card(patch_size=32)).grid == (1, 1)


IN_255 = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
THREE = "teacher card 'tiny' has mean {mean} and std {std}: give three numbers each, for R, G and B."


@pytest.mark.parametrize('wrong', [
    dict(mean=[123.675]), dict(std=[58.395] * 4), dict(mean=127.5), dict(std=127.5), dict(mean=None), dict(std='abc'),
    dict(mean=['123', '116', '103']), dict(mean=[[1.0], [2.0], [3.0]]), dict(mean=[1.0] * 2, std=[60.0] * 4)])
def test_check_normalisation__not_three_numbers_each(wrong):
    given = {**IN_255, **wrong}
    with pytest.raises(ValueError) as caught:
        find_card(tiny_card(**given))
    assert str(caught.value) == THREE.format(**given)


@pytest.mark.parametrize('given, said', [
    (dict(std=[0.229, 0.224, 0.225]), 'mean 123.675, 116.28, 103.53 and std 0.229, 0.224, 0.225'),
    (dict(std=(0.5, 0.5, 0.5)), 'mean 123.675, 116.28, 103.53 and std 0.5, 0.5, 0.5'),
    (dict(std=[58.395, 57.12, 0.225]), 'mean 123.675, 116.28, 103.53 and std 58.395, 57.12, 0.225'),
    (dict(std=[0, 60, 60]), 'mean 123.675, 116.28, 103.53 and std 0, 60, 60'),
    (dict(mean=[0.485, 0.456, 0.406]), 'mean 0.485, 0.456, 0.406 and std 58.395, 57.12, 57.375')])
def test_check_normalisation__of_images_in_0_to_1(given, said):
    with pytest.raises(ValueError) as caught:
        find_card(tiny_card(**given))
    assert str(caught.value) == (f"teacher card 'tiny' has {said}, as for images in 0-1: give mean and std of images "
                                 'in 0-255, 255 times as large.')


@pytest.mark.parametrize('registers', [-1, 1.0, '4'])
def test_card__registers_that_are_no_number(registers):
    with pytest.raises(ValueError, match=re.escape(f"teacher card 'tiny' has registers {registers!r}: give a whole")):
        find_card(tiny_card(registers=registers))


def test_check_normalisation__of_a_teacher_built_of_a_card_and_of_any_owner():
    with pytest.raises(ValueError, match=r"^teacher card 'tiny' has mean .* and std 0\.5, 0\.5, 0\.5, as for images"):
        ViTTeacher(tiny_card(std=[0.5] * 3), checkpoint=None)
    with pytest.raises(ValueError, match=r'^the owner has mean \[1\.0\] and std \[1\.0, 1\.0, 1\.0\]: give three '):
        check_normalisation([1.0], [1.0] * 3, 'the owner')
    # Images in 0-255, left as they are: the smallest that is taken.
    check_normalisation([0.0] * 3, [1, 1, 1], 'the owner')
    with pytest.raises(ValueError, match='^the owner has mean .* in 0-1'):
        check_normalisation([0.0] * 3, [1, 1, 0.999], 'the owner')


def test_find_card__registers_without_class_token():
    with pytest.raises(ValueError, match="card 'tiny' has registers and no class token, which no known ViT has"):
        find_card(tiny_card(registers=4, class_token=False))


def test_find_card__unknown_name():
    with pytest.raises(ValueError, match=r"unknown teacher card 'mae-vit-b'\. Did you mean 'mae-vit-b-p16'\?"):
        find_card('mae-vit-b')
    with pytest.raises(ValueError, match=r"unknown teacher card 'zzz'\. The cards are clip-vit-b-p32, ") as caught:
        find_card('zzz')
    assert all(name in str(caught.value) for name in CARDS)
    assert 'a teacher of your own is a dict of the fields of mmhdistill.models.TeacherCard' in str(caught.value)


def test_find_card__bad_dict():
    with pytest.raises(ValueError, match=r"a teacher card has no fields \['patch'\]: the fields are \[.*'patch_size'"):
        find_card({**tiny_card(), 'patch': 8})
    card = tiny_card()
    del card['mean'], card['depth']
    with pytest.raises(ValueError, match=r"the teacher card lacks \['depth', 'mean'\]: give them, as RGB in 0-255"):
        find_card(card)


def test_find_card__name_dict_and_card():
    card = find_card(tiny_card(mlp_ratio=2.0))
    assert card == TeacherCard(**tiny_card(mlp_ratio=2.0))
    assert find_card(card) is card
    assert card.backbone()['arch'] == dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
    assert find_card('mae-vit-b-p16') is CARDS['mae-vit-b-p16']
    # A shipped card is where one's own begins.
    assert find_card(dataclasses.asdict(CARDS['mae-vit-b-p16'])) == CARDS['mae-vit-b-p16']
