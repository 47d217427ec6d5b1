"""tools/teachers.py: what it prints, and how it refuses."""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmhdistill.models import CARDS
from tests.helpers import randomise

TOOL = Path(__file__).parents[2] / 'tools/teachers.py'
CARD = 'deit-vit-ti-p16'
SHA256 = '[0-9a-f]{64}'


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool and returns what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['teachers.py', *map(str, args)])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capsys.readouterr().out

    return run


@pytest.fixture
def native():
    import timm
    torch.manual_seed(0)
    return randomise(timm.create_model('deit_tiny_patch16_224')).eval()


@pytest.fixture
def weights(native, tmp_path):
    """A file as DeiT publishes it."""
    torch.save(dict(model=native.state_dict()), tmp_path / 'deit_tiny_patch16_224.pth')
    return tmp_path / 'deit_tiny_patch16_224.pth'


def expected_numbers(native, pixels):
    """Mean norm of the patch tokens and mean cosine among them, by timm."""
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(CARDS[CARD].__dict__[key]).view(3, 1, 1) for key in ('mean', 'std'))
    images = F.interpolate((images - mean) / std, (224, 224), mode='bicubic', antialias=True)
    with torch.no_grad():
        tokens = native.forward_features(images)[0, 1:]
    unit = F.normalize(tokens, dim=-1)
    return tokens.norm(dim=-1).mean().item(), (unit @ unit.T).mean().item()


def assert_numbers(text, native, pixels):
    printed = re.search(r'196 patch tokens of width 192 in [\d.]+ s, mean norm ([\d.]+), mean cosine among them '
                        r'([\d.]+)$', text.strip())
    assert [float(x) for x in printed.groups()] == pytest.approx(expected_numbers(native, pixels), abs=0.0055)


def test_list__every_card(tool):
    lines = tool('list').splitlines()
    assert [line.split()[0] for line in lines] == ['card', *CARDS]
    lines = tool('list', '--markdown').splitlines()
    assert [line.split()[1] for line in lines[2:]] == list(CARDS)
    assert {line.count('|') for line in lines} == {11}


def test_show__a_card(tool):
    lines = dict(line.split(maxsplit=1) for line in tool('show', 'dinov2-reg4-vit-s-p14').splitlines())
    assert (lines['embed_dims'], lines['registers'], lines['img_size'], lines['licence']) == \
        ('384', '4', '518', 'Apache-2.0')
    assert lines['url'] == CARDS['dinov2-reg4-vit-s-p14'].url


def test_check__on_the_photograph_of_scikit_image(tool, native, weights):
    from skimage import data
    text = tool('check', CARD, '--checkpoint', weights)
    lines = text[text.index(f"teacher '{CARD}': "):].splitlines()
    assert lines[0] == "teacher 'deit-vit-ti-p16': deit-vit-ti-p16 (licence Apache-2.0)"
    assert lines[1] == f'  file     {weights}'
    # The card's hash is that of the trained weights.
    assert re.fullmatch(rf'  sha256   {SHA256}, another file than the published one', lines[2])
    assert lines[3] == "  tensors  150/150, timm format in entry 'model', float32; left aside: head.* (2)"
    assert lines[5] == '  tokens   224x224 px, 14x14 patches; extra tokens: 1 class; positions as trained'
    # Patches; 12 blocks of 12 x 192^2 weights on 197 tokens; scores and their use.
    flops = 2 * 196 * 768 * 192 + 12 * (2 * 197 * 12 * 192**2 + 4 * 197**2 * 192)
    assert lines[6] == f'  runs     layers 0 to 11 of 12, {flops / 1e9:.1f} GFLOPs an image'
    assert_numbers(text, native, data.astronaut())


def test_check__on_an_image_of_ones_own(tool, native, weights, tmp_path):
    from skimage import data
    pixels = data.chelsea()
    Image.fromarray(pixels).save(tmp_path / 'cat.png')
    assert_numbers(tool('check', CARD, '--checkpoint', weights, '--image', tmp_path / 'cat.png'), native, pixels)
    others = expected_numbers(native, data.astronaut())
    assert np.abs(np.subtract(expected_numbers(native, pixels), others)).max() > 0.02


def test_check__options_reach_the_file(tool, native, weights):
    import hashlib
    state = native.state_dict()
    zeros = {name: torch.zeros_like(x) for name, x in state.items()}
    torch.save(dict(model=zeros, model_ema={**{'a.' + name: x for name, x in zeros.items()},
                                            **{'b.' + name: x for name, x in state.items()}}), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    from skimage import data
    text = tool('check', CARD, '--checkpoint', weights, '--sha256', digest[:10], '--entry', 'model_ema', '--prefix',
                'b.')
    assert f'  sha256   {digest}, as expected' in text.splitlines()
    assert_numbers(text, native, data.astronaut())


@pytest.mark.parametrize('args, message', [
    (('show', 'deit-vit-tiny-p16'), "unknown teacher card 'deit-vit-tiny-p16'. Did you mean 'deit-vit-ti-p16'?"),
    (('check', 'zzz'), "unknown teacher card 'zzz'. The cards are "),
    (('check', CARD, '--checkpoint', '{}/none.pth'), '{}/none.pth does not exist: give the path'),
    (('check', CARD, '--checkpoint', '{}/text.pth'), 'weight file {}/text.pth cannot be read: it is damaged'),
    (('check', CARD, '--checkpoint', '{}/cut.pth'), 'weight file {}/cut.pth cannot be read: it is damaged'),
    (('check', 'deit-vit-s-p16', '--checkpoint', '{}/deit_tiny_patch16_224.pth'),
     "{}/deit_tiny_patch16_224.pth does not fit card 'deit-vit-s-p16' (12 layers of width 384, patch 16): "),
    (('check', CARD, '--checkpoint', '{}/other.pth'), '{}/other.pth is in no known format: expected the keys of one'),
    (('check', CARD, '--checkpoint', '{}/deit_tiny_patch16_224.pth', '--sha256', '0badc0de'),
     'and 0badc0de is expected: it is damaged, or another file. Give the right file, or correct the hash.'),
    (('check', CARD, '--checkpoint', '{}/deit_tiny_patch16_224.pth', '--entry', 'ema'),
     "weight file {}/deit_tiny_patch16_224.pth has no entry 'ema': its entries are ['model']."),
    (('check', CARD, '--checkpoint', '{}/deit_tiny_patch16_224.pth', '--prefix', 'a.'),
     "{}/deit_tiny_patch16_224.pth holds no ViT under the prefix 'a.', but under '': correct prefix=..."),
    (('check', CARD, '--checkpoint', 'http://127.0.0.1:9/w.pth'), 'http://127.0.0.1:9/w.pth cannot be fetched'),
    (('check', CARD, '--checkpoint', '{}/deit_tiny_patch16_224.pth', '--image', '{}/text.pth'),
     '{}/text.pth is no image file that can be read: give a JPEG or PNG.'),
    (('check', CARD, '--checkpoint', '{}/deit_tiny_patch16_224.pth', '--image', '{}/none.png'), '{}/none.png'),
])
def test_main__refuses_in_one_sentence(tool, weights, tmp_path, monkeypatch, args, message):
    monkeypatch.setenv('MMHDISTILL_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'text.pth').write_text('no weights')
    (tmp_path / 'cut.pth').write_bytes(weights.read_bytes()[:-3000])
    torch.save({'layer1.0.conv1.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    with pytest.raises(SystemExit) as caught:
        tool(*(arg.replace('{}', str(tmp_path)) for arg in args))
    # Python prints a text that it exits with, and returns 1.
    assert caught.value.code.startswith('teachers.py: ')
    assert message.replace('{}', str(tmp_path)) in caught.value.code
    assert '\n' not in caught.value.code


def test_main__a_refusal_is_no_traceback(tmp_path):
    run = subprocess.run([sys.executable, TOOL, 'check', CARD, '--checkpoint', tmp_path / 'w.pth'],
                         capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ''
    assert 'Traceback' not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(f'teachers.py: {tmp_path}/w.pth does not exist')
