import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmhdistill.analysis.teachers import as_markdown, as_text, card_rows, check, show
from mmhdistill.models import CARDS, TeacherCard, ViTTeacher
from tests.helpers import IMAGENET, randomise, tiny_card

CARD = TeacherCard(**tiny_card(licence='MIT'))


def save(path, change=lambda vit: None):
    vit = randomise(ViTTeacher(CARD, checkpoint=None).vit)
    with torch.no_grad():
        change(vit)
    torch.save(vit.state_dict(), path)
    return str(path)


def measured(text):
    """Mean norm and mean cosine, as printed."""
    words = text.splitlines()[-1].replace(',', '').split()
    return float(words[words.index('norm') + 1]), float(words[-1])


def test_card_rows__every_card_once():
    header, *rows = card_rows()
    assert [row[0] for row in rows] == list(CARDS)
    assert {len(row) for row in rows} == {len(header)} == {10}
    by_name = {row[0]: row for row in rows}
    assert by_name['dinov2-reg4-vit-g-p14'] == (
        'dinov2-reg4-vit-g-p14', '1536 x 40, 24', '14', '518', 'class + 4', 'ImageNet', 'bicubic-antialias', 'timm',
        'sha256 746ecb8c', 'Apache-2.0')
    assert by_name['mae-vit-b-p16'][5:] == ('ImageNet', 'bicubic', 'timm', 'sha256 aec5f0b6, md5 8cad7c',
                                            'CC-BY-NC-4.0')
    assert by_name['siglip-vit-b-p16'][4:6] == ('none', '0.5')
    assert by_name['clip-vit-l-p14'][4:6] == ('class', 'CLIP')
    assert by_name['deit3-vit-s-p16'][8] == 'none published'


def test_as_text__columns_are_aligned():
    assert as_text([('a', 'long'), ('much', 'b')]) == 'a     long\nmuch  b'


def test_as_markdown__a_table():
    assert as_markdown([('a', 'b'), ('1', '2'), ('3', '4')]) == '| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |'


@pytest.mark.parametrize('name', ['clip-vit-b-p16', 'siglip-vit-so400m-p14-384'])
def test_show__every_field(name):
    lines = dict(line.split(maxsplit=1) for line in show(CARDS[name]).splitlines())
    card = CARDS[name]
    assert list(lines) == [field.name for field in dataclasses.fields(TeacherCard)]
    assert lines == {key: str(getattr(card, key)) for key in lines}


def test_check__numbers_are_those_of_the_features(tmp_path):
    """Of an image at the card's own size, so that nothing is resized."""
    path = save(tmp_path / 'w.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    text = check(CARD, path, str(tmp_path / 'photo.png'))
    teacher = ViTTeacher(CARD, checkpoint=path)
    teacher.load()
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ('mean', 'std'))
    images = (torch.from_numpy(pixels).permute(2, 0, 1).float() - mean) / std
    x = teacher(images[None], (4, 4), {2: frozenset({'features'})}).patches(2, 'features')[0].numpy()
    norms = np.linalg.norm(x, axis=1)
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in x for b in x])
    assert measured(text) == pytest.approx((norms.mean(), cosine), abs=0.00501)
    assert '16 patch tokens of width 32 in ' in text
    assert text.splitlines()[0] == "teacher 'tiny': tiny (licence MIT)"
    assert text.splitlines()[1] == f'  file     {path}'
    assert '  tensors  42/42, mmpretrain format, float32; left aside: nothing' in text.splitlines()
    assert any(line.startswith('  runs     layers 0 to 2 of 3, ') for line in text.splitlines())


def test_check__alike_features_have_cosine_one(tmp_path):
    """A final norm that is a constant: every token is (3, 3, ..., 3), of norm 3 sqrt(32)."""
    def constant(vit):
        vit.ln1.weight.zero_()
        vit.ln1.bias.fill_(3.0)

    path = save(tmp_path / 'w.pth', constant)
    assert measured(check(CARD, path, None)) == (16.97, 1.0)


def test_check__channels_are_rgb(tmp_path):
    """The photograph is read as PIL reads it."""
    path = save(tmp_path / 'w.pth')
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, 32, dtype=np.uint8)
    found = []
    for name, image in (('rgb', pixels), ('bgr', pixels[..., ::-1])):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / f'{name}.png')
        found.append(measured(check(CARD, path, str(tmp_path / f'{name}.png'))))
    teacher = ViTTeacher(CARD, checkpoint=path, input_mean=[0.0] * 3, input_std=[1.0] * 3)
    teacher.load()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    x = teacher(x, (4, 4), {2: frozenset({'features'})}).patches(2, 'features')[0]
    assert found[0][0] == pytest.approx(x.norm(dim=-1).mean().item(), abs=0.00501)
    assert found[0] != found[1]


def test_check__features_that_are_not_finite_are_refused(tmp_path):
    path = save(tmp_path / 'w.pth', lambda vit: vit.layers[1].ffn.layers[1].bias[0].fill_(float('inf')))
    with pytest.raises(ValueError, match=r'1 not finite \(layers\.1\.ffn\.layers\.1\.bias\)\. Nothing was loaded'):
        check(CARD, path, None)
    # Finite weights whose features are not.
    path = save(tmp_path / 'w.pth', lambda vit: vit.layers[1].ffn.layers[1].bias.fill_(3e38))
    with pytest.raises(ValueError, match=f'^{path} gives features that are not finite: its weights are damaged.$'):
        check(CARD, path, None)


def test_check__hash_entry_and_prefix(tmp_path):
    path = tmp_path / 'w.pth'
    states = [randomise(ViTTeacher(CARD, checkpoint=None).vit, seed).state_dict() for seed in (0, 1)]
    torch.save(dict(model={'student.' + name: x for name, x in states[0].items()},
                    ema={**{'a.' + name: x for name, x in states[0].items()},
                         **{'b.' + name: x for name, x in states[1].items()}}), path)
    text = check(CARD, str(path), None, entry='ema', prefix='b.')
    assert ("  tensors  42/42, mmpretrain format under 'b.' in entry 'ema', float32; left aside: a.* (42), model"
            in text.splitlines())
    torch.save(states[1], tmp_path / 'alone.pth')
    assert measured(text) == measured(check(CARD, str(tmp_path / 'alone.pth'), None))
    assert measured(text) != measured(check(CARD, str(path), None, entry='ema', prefix='a.'))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    text = check(CARD, str(path), None, sha256=digest[:8], entry='ema', prefix='b.')
    assert f'  sha256   {digest}, as expected' in text.splitlines()
    with pytest.raises(ValueError, match=f'has sha256 {digest}, and 0badc0de is expected'):
        check(CARD, str(path), None, sha256='0badc0de', entry='ema', prefix='b.')


def test_check__an_image_that_is_none(tmp_path):
    (tmp_path / 'photo.png').write_text('no image')
    with pytest.raises(ValueError, match=r'photo\.png is no image file that can be read: give a JPEG or PNG\.$'):
        check(CARD, save(tmp_path / 'w.pth'), str(tmp_path / 'photo.png'))
