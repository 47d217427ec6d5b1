"""docs/imperfect-data.md: what it says can be typed, is run, and what it lists is what there is."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, HOOKS, DefaultScope

import mmhdistill.engine  # noqa: F401
from mmhdistill.datasets import decode
from mmhdistill.datasets.image_folder import ImageFolder
from tests.datasets.image_files import bad_files, write_corpus
from tests.helpers import write_images

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs/imperfect-data.md').read_text()


def test_check__command(tmp_path):
    command, = re.findall(r'```bash\n(.*)\n```', TEXT)
    python, *words = shlex.split(command)
    assert python == 'python'
    bad = bad_files(each=1)
    write_images(tmp_path / words[-1], [f'{index}.jpg' for index in range(3)])
    write_corpus(tmp_path / words[-1], bad)
    done = subprocess.run([sys.executable, *words, '--workers', '2'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.split('\t')[:2] for line in done.stdout.splitlines()] == [
        [problem, f'{words[-1]}/{name}'] for name, (_, problem) in sorted(bad.items())]
    assert done.stderr.splitlines()[-1] == f'{len(bad) + 3} paths, of which {len(bad)} cannot be used'


@pytest.mark.parametrize('heading, classes', [('What is skipped', decode.SKIPPED),
                                              ('What is converted', decode.CONVERTED)])
def test_tables__name_every_class(heading, classes):
    section = TEXT.partition(f'## {heading}\n')[2].partition('\n## ')[0]
    assert re.findall(r'^\| `([^`]+)` \|', section, re.M) == list(classes)


def test_numbers__are_those_of_the_code():
    assert f'below {decode.MIN_SIDE} px' in TEXT and f'over {decode.MAX_ASPECT} times' in TEXT
    assert f'{decode.MAX_PIXELS:,} pixels' in TEXT
    assert ImageFolder.__init__.__defaults__[3] == 0.05 and 'more than 5 % of' in TEXT
    for name in re.findall(r'JPEG, .*?(?=,\s+whatever)', TEXT)[0].split(', '):
        assert name.upper() in decode._FORMATS


def test_config__builds_and_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'data/photos', [f'{index}.png' for index in range(4)])
    (tmp_path / 'data/photos/4.png').write_bytes(b'')
    (tmp_path / 'config.py').write_text(re.findall(r'```python\n(.*?)```', TEXT, re.S)[0])
    cfg = Config.fromfile(tmp_path / 'config.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        hook, = (HOOKS.build(hook) for hook in cfg.custom_hooks)
    assert all(dataset[index]['inputs'].shape == (3, 224, 224) for index in range(5))
    assert (dataset.max_bad, hook.interval, dataset.num_bad()) == (0.01, 1000, 1)


@pytest.mark.parametrize('name', ['hdistill/vit-b_clip-mae_300e.py', 'quickstart/hdistill_vit-photos.py'])
def test_limit__is_an_option_of_the_recipes_which_report(name, tmp_path):
    option, = re.findall(r'--cfg-options (\S+)`', TEXT)
    key, _, value = option.partition('=')
    cfg = Config.fromfile(ROOT / 'configs' / name)
    cfg.merge_from_dict({key: DictAction._parse_int_float_bool(value)})
    write_images(tmp_path, ['a/0.png', 'b/1.png'])
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert DATASETS.build(cfg.train_dataloader.dataset).max_bad == float(value)
    assert cfg.train_dataloader.dataset.pipeline[0].type == 'mmhdistill.LoadImage'
    assert cfg.default_hooks.data.type == 'mmhdistill.DataReport'
