"""What README.md and docs/ say can be typed, can be typed."""
import csv
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction

from mmhdistill.analysis.studies import STUDIES
from mmhdistill.registry import MODELS

pytestmark = pytest.mark.usefixtures('free_memory')
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
TEXT = '\n'.join(page.read_text() for page in PAGES)
TOOLS = sorted(set(re.findall(r'tools/[\w/]+\.(?:py|sh)', TEXT)))


def python_blocks() -> list[str]:
    return re.findall(r'```python\n(.*?)```', TEXT, flags=re.S)


def config_of(tmp_path: Path, text: str) -> Config:
    path = tmp_path / 'config.py'
    path.write_text(text)
    return Config.fromfile(path)


@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\(([^)#]+)\)', TEXT))))
def test_link_target_exists(link):
    if link.startswith('http'):
        assert re.match(r'https://[\w.-]+\.\w+/', link)
    else:
        assert (ROOT / link).exists() or (ROOT / 'docs' / link).exists()


@pytest.mark.parametrize('config', sorted(set(re.findall(r'configs/[\w/.-]+\.py', TEXT))))
def test_named_config_parses(config):
    cfg = Config.fromfile(ROOT / config)
    assert cfg.cells if '/ablations/' in config else cfg.model.type


@pytest.mark.parametrize('tool', TOOLS)
def test_named_tool_runs(tool):
    if tool.endswith('.py'):
        def help_of(*command):
            return subprocess.run([sys.executable, ROOT / tool, *command, '--help'], capture_output=True, text=True,
                                  check=True).stdout

        out = help_of()
        commands = re.match(r'usage: \S+ \[-h\] \{([\w,]+)\}', out)
        for command in commands[1].split(',') if commands else []:
            out += help_of(command)
        for option in re.findall(rf'{tool}[^`\n]*?(--[\w-]+)', TEXT):
            assert option in out
    else:
        subprocess.run(['bash', '-n', ROOT / tool], check=True)


def test_options_of_train_are_known():
    help_text = subprocess.run([sys.executable, ROOT / 'tools/train.py', '--help'], capture_output=True, text=True,
                               check=True).stdout
    for option in ('--resume', '--auto-scale-lr', '--no-amp', '--cfg-options', '--work-dir'):
        assert option in help_text


def test_cfg_options_name_settings_that_exist():
    usual, from_weights = (Config.fromfile(ROOT / 'configs' / name)
                           for name in ('hdistill/vit-b_clip-mae_300e.py', 'moma/vit-b_moco-to-mae_100e.py'))
    keys = set(re.findall(r'((?:train_dataloader|model|optim_wrapper)\.[\w.]+)=', TEXT))
    assert len(keys) >= 5
    for key in keys:
        parent, _, leaf = key.rpartition('.')
        node = from_weights if 'init_from' in key else usual
        for part in parent.split('.'):
            node = node[part]
        # Arguments with defaults that the config leaves alone.
        assert leaf in node or leaf in ('checkpoint', 'loss_weight', 'accumulative_counts', 'max_bad', 'with_cp',
                                        'dtype', 'compile')


def test_config_for_an_existing_project__builds_and_learns(tmp_path):
    text = next(block for block in python_blocks() if 'HybridDistiller' in block)
    cfg = config_of(tmp_path, text)
    for teacher in cfg.model.teachers.values():
        teacher.checkpoint = None
    model = MODELS.build(cfg.model)
    losses = model(torch.randn(1, 3, 224, 224), mode='loss')
    assert set(losses) == {'loss/feature', 'loss/relation'}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_backbone_for_transfer__loads_a_distiller_checkpoint(tmp_path):
    from mmpretrain.registry import MODELS as MMPRETRAIN
    text = next(block for block in python_blocks() if 'Pretrained' in block)
    cfg = config_of(tmp_path, text)
    project = config_of(tmp_path, next(block for block in python_blocks() if 'HybridDistiller' in block))
    for teacher in project.model.teachers.values():
        teacher.checkpoint = None
    distiller = MODELS.build(project.model)
    cfg.backbone.init_cfg.checkpoint = str(tmp_path / 'epoch_300.pth')
    torch.save(dict(state_dict=distiller.state_dict()), tmp_path / 'epoch_300.pth')
    backbone = MMPRETRAIN.build(cfg.backbone)
    backbone.init_weights()
    for name, parameter in backbone.state_dict().items():
        assert torch.equal(parameter, distiller.backbone.state_dict()[name])


def test_bash_blocks_are_commands_of_this_repository():
    commands = [line for block in re.findall(r'```bash\n(.*?)```', TEXT, flags=re.S) for line in block.splitlines()]
    for command in commands:
        first = shlex.split(command, comments=True)
        assert first[0] in ('bash', 'pip', 'python') or (ROOT / first[0]).exists()


def ablations() -> list[str]:
    row = next(line for line in TEXT.splitlines() if line.startswith('| ablate'))
    return re.findall(r'`([^`]+)`', row)


@pytest.mark.parametrize('options', ablations())
def test_ablation_options__build(options):
    cfg = Config.fromfile(ROOT / 'configs/hdistill/vit-b_clip-mae_300e.py')
    cfg.merge_from_dict({key: DictAction._parse_int_float_bool(value)
                         for key, value in (option.split('=') for option in options.split())})
    for teacher in cfg.model.teachers.values():
        teacher.checkpoint = None
    model = MODELS.build(cfg.model)
    switched_off = re.findall(r'losses\.(\w+)\.loss_weight=0', options)
    assert set(model.losses) == {'feature', 'relation'} - set(switched_off)
    assert set(model.teachers) == {cfg.model.losses[name].teacher for name in model.losses}
    losses = model(torch.randn(1, 3, 224, 224), mode='loss')
    assert all(torch.isfinite(loss) for loss in losses.values())
    if 'keep_rate=1' in options:
        assert model.masker.last_counts == [196] * 3


def test_ablation_table__says_what_was_measured():
    rows = list(csv.DictReader((ROOT / 'docs/ablation-quickstart.csv').open()))
    grid = Config.fromfile(ROOT / 'configs/ablations/quickstart.py')
    assert [(row['cell'], int(row['seed'])) for row in rows] == [
        (cell, seed) for cell in grid.cells for seed in grid.seeds]
    text = (ROOT / 'docs/method.md').read_text()
    for cell in grid.cells:
        cells = re.search(rf'^\| {re.escape(cell)} \| (.*) \|$', text, re.M)[1].split(' | ')
        for said, metric in zip(cells, ('knn/patch', 'knn/cls'), strict=True):
            values = [float(row[metric]) for row in rows if row['cell'] == cell]
            assert said == f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'


@pytest.mark.parametrize('method, page, results', [
    ('hybrid', 'README.md', 'quickstart.json'), ('moma', 'docs/method.md', 'quickstart-moma.json')])
def test_quick_start_table__says_what_was_measured(method, page, results):
    text, study = (ROOT / page).read_text(), STUDIES[method]
    results = json.loads((ROOT / 'docs' / results).read_text())
    assert all(study.claims(results).values())
    layer, = results['relation_layers']
    for name, label in study.labels.items():
        cells = [cell.strip() for cell in re.search(rf'^\| {re.escape(label)} \|(.*)\|$', text, re.M)[1].split('|')]
        row, columns = results[name], [f"{results[name]['knn']:.1f}"]
        if method == 'moma':
            student = study.students.get(name)
            columns.append(f"{row['knn'] - results[student.start]['knn']:+.1f}" if student else '')
        columns.append(f"{row['nmi'][layer]:.3f}" if 'nmi' in row else '')
        columns.append(f"{row['relation_kl']:.3f}" if 'relation_kl' in row else '')
        assert cells == columns
