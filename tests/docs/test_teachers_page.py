"""docs/teachers.md: its table is the cards', its commands and configs run as they are written."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmhdistill.analysis.teachers import as_markdown, card_rows
from mmhdistill.models import CARDS
from mmhdistill.registry import MODELS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs/teachers.md').read_text()
README = (ROOT / 'README.md').read_text()
FILE = 'deit_tiny_patch16_224-a1311bcf.pth'


def blocks(language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', PAGE, flags=re.S)


def commands() -> list[str]:
    found = [line for page in (PAGE, README) for block in re.findall(r'```bash\n(.*?)```', page, flags=re.S)
             for line in block.splitlines() if 'teachers.py' in line]
    return sorted(set(found))


def run(command: str, folder: Path) -> str:
    words = shlex.split(command)
    assert words[:2] == ['python', 'tools/teachers.py']
    return subprocess.run([sys.executable, ROOT / words[1], *words[2:]], cwd=folder, capture_output=True, text=True,
                          check=True).stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with the file that the page checks: its published layout, random weights."""
    import timm
    torch.manual_seed(0)
    torch.save({'model': timm.create_model('deit_tiny_patch16_224').state_dict()}, tmp_path / FILE)
    return tmp_path


def test_table__is_made_from_the_cards():
    assert f'\n{as_markdown(card_rows())}\n' in PAGE
    assert f'{len(CARDS)} cards' in README


@pytest.mark.parametrize('command', commands())
def test_command__runs_as_written(command, folder):
    words = {'list': list(CARDS), 'show': ['embed_dims', '1536' if '-g-' in command else '768'],
             'check': ['150/150 tensors', '196 patch tokens of width 192']}
    out = ' '.join(run(command, folder).split())
    kind, = [word for word in words if f' {word}' in command]
    for word in words[kind]:
        assert word in out.replace('tensors 150/150', '150/150 tensors')


def test_receipt__is_what_check_prints(folder):
    """Up to hash, numbers that depend on the random weights, and seconds."""
    def shape(text: str) -> list[str]:
        text = re.sub(r'[0-9a-f]{64}', 'HASH', text)
        lines = [line for line in text.splitlines()
                 if not any(word in line for word in ('bfloat16', 'forward', 'mmengine'))]
        return [' '.join(line.split()) for line in lines]

    command = next(command for command in commands() if ' check ' in command)
    shown = re.search(r"^```\n(teacher '.*?)^```", PAGE, flags=re.S | re.M)[1]
    assert shape(shown) == shape(run(command, folder))


def test_configs__build_as_written(tmp_path, monkeypatch):
    import transformers
    monkeypatch.chdir(tmp_path)
    # What a name of the hub stands for may be a folder.
    config = transformers.IJepaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    transformers.IJepaModel(config).save_pretrained('facebook/ijepa_vith14_1k')
    Path('facebook/ijepa_vith14_1k/preprocessor_config.json').write_text(
        json.dumps(dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    built = {}
    for block in blocks('python'):
        Path('config.py').write_text(block)
        cfg = Config.fromfile('config.py')
        teachers = cfg.get('teachers') or {key: value for key, value in cfg.items() if key != 'teachers'}
        for name, teacher in teachers.items():
            built[name] = MODELS.build({**teacher, 'checkpoint': None, 'name': name})
    assert {name: (teacher.spec.embed_dims, teacher.spec.num_extra_tokens) for name, teacher in built.items()} == {
        'clip': (768, 1), 'mae': (768, 1), 'mine': (384, 1), 'dinov3': (384, 5), 'ijepa': (32, 0)}


def test_precision__says_what_was_measured():
    found = json.loads((ROOT / 'docs/quickstart.json').read_text())
    supervised, mae = (found[name]['bfloat16'] for name in ('supervised', 'mae'))
    text = ' '.join(PAGE.split())
    assert f"supervised ViT differ by {supervised['features']:.2%} from" in text.replace(' %', '%')
    assert f"those of its MAE by {mae['features']:.2%};" in text.replace(' %', '%')
    assert f"by a KL of {mae['relations']:.1e}, where" in text
    assert f"that it taught differ by {found['hybrid']['relation_kl']:.3f}." in text
