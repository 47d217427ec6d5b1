"""tools/plan.py."""
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmhdistill.analysis.plan import plan

ROOT = Path(__file__).parents[2]
HYBRID = ROOT / 'configs/hdistill/vit-b_clip-mae_300e.py'


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool and returns what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['plan.py', *map(str, args)])
        runpy.run_path(str(ROOT / 'tools/plan.py'), run_name='__main__')
        return capsys.readouterr().out

    return run


def test_plan__of_hybrid_distill(tool, tmp_path):
    lines = tool(HYBRID, '--json', tmp_path / 'plan.json')
    text = ' '.join(lines.split())
    for said in (
            "masker input: SimilarityScorer on layers 0, 4, 8 of teacher 'mae', keep rate 0.7 a stage; 196 patches "
            'become 137, 96, 67; of the student layers 0 to 11 see 67',
            'relation 1 x TokenRelationLoss: relations qk of layers 8, 9, 10 of the student and 8, 9, 10 of teacher '
            "'mae', at 67 patches; distance kl, relation_heads 12",
            'clip clip-vit-b-p16, runs layers 0 to 11 of 12 (width 768, 12 heads); sees 224x224 px, 14x14 patches of '
            '16 px, re-normalised to mean 122.77 116.75 104.09',
            'student 85.80 M', 'student, forward 11.95 GFLOPs 35.13 GFLOPs', '0.57 of the naive way',
            'Memory of a GPU, estimated: 256 images, mixed precision', '8 GPUs x 256 images = 2048 images a step',
            '1,281,167 images an epoch (ImageNet-1K as published; data/imagenet/train is not there)',
            'at 100 TFLOP/s per GPU, an assumption: give --tflops', '3 kept:'):
        assert said in text
    assert max(len(line) for line in lines.splitlines() if 'https' not in line) <= 120
    facts = json.loads((tmp_path / 'plan.json').read_text())
    assert facts['masker']['counts'] == [137, 96, 67]
    assert facts['flops']['this']['total'] == 101_079_404_544
    # An earlier plan is not lost.
    with pytest.raises(SystemExit):
        tool(HYBRID, '--json', tmp_path / 'plan.json')
    assert json.loads((tmp_path / 'plan.json').read_text()) == facts


def test_plan__options(tool, config):
    text = tool(config, '--gpus', 2, '--tflops', 0.5, '--images', 1000, '--auto-scale-lr', '--cfg-options',
                'model.masker.keep_rate=0.5', 'train_dataloader.batch_size=5')
    assert '2 GPUs x 5 images = 10 images a step, learning rate 0.00125' in text
    assert '1,000 images an epoch (given)' in text
    assert '200 iterations: ' in text
    assert 'at 0.5 TFLOP/s per GPU\n' in text
    assert '64 patches become 32, 16, 8' in ' '.join(text.split())


@pytest.mark.parametrize('args, message', [
    (['--cfg-options', 'model.losses.relation.layers=[(8,12)]'], 'layer 12 is out of range for the teacher'),
    (['--cfg-options', 'model.backbone.arch=none'], 'Arch none is not in default archs'),
    (['--cfg-options', 'model.losses.relation.type=NoLoss'], 'NoLoss is not in the mmpretrain::model registry'),
    (['--gpus', '3'], 'cannot be split over 3 GPUs equally'),
    (['--cfg-options', 'train_dataloader.dataset.pipeline.1.scale=225'], 'images of 225x225 pixels cannot be cut into'),
])
def test_plan__errors(tool, args, message):
    with pytest.raises(SystemExit, match=message) as error:
        tool(HYBRID, *args)
    assert error.value.code.startswith('plan.py: ')
    assert '\n' not in error.value.code


@pytest.mark.parametrize('path, problem', [
    ('train_dataloader.batchsize', "train_dataloader: no 'batchsize' is taken: did you mean 'batch_size'? There is "),
    ('default_hooks.checkpont.interval', "default_hooks: no 'checkpont' is there: did you mean 'checkpoint'?"),
    ('model.masker.keep_rat', "model.masker: no 'keep_rat' is taken: did you mean 'keep_rate'? There is "),
    ('model.backbone.nonsense', "model.backbone: no 'nonsense' is taken: There is "),
])
def test_plan__misspelt_option(tool, path, problem):
    with pytest.raises(SystemExit) as error:
        tool(HYBRID, '--cfg-options', f'{path}=1')
    first, second = error.value.code.splitlines()
    assert first == 'plan.py: the config has settings that nothing would read:'
    assert second.startswith(f'--cfg-options {path}: {problem}')


def test_plan__option_that_may_be_misspelt_is_told(tool, capsys):
    with pytest.raises(SystemExit, match='over 3 GPUs'):
        tool(HYBRID, '--gpus', 3, '--cfg-options', 'default_hooks.checkpoint.max_keep_ckpt=1')
    assert capsys.readouterr().err.startswith(
        'plan.py: --cfg-options default_hooks.checkpoint.max_keep_ckpt: default_hooks.checkpoint: no '
        "'max_keep_ckpt' is known: did you mean 'max_keep_ckpts'?")


def test_plan__of_no_distiller():
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/plan.py', ROOT / 'configs/transfer/classification/vit-b_ft-100e_in1k.py'],
        capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.splitlines()[-1].endswith('or one like them.')
    assert 'trains ImageClassifier, and only a distiller' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('args', [['--gpus', '0'], ['--tflops', '-1']])
def test_plan__numbers_above_0(tool, args):
    with pytest.raises(SystemExit) as error:
        tool(HYBRID, *args)
    assert error.value.code == 2


@pytest.mark.slow
def test_plan__disk_is_what_a_run_fills(config):
    found = plan(Config.fromfile(config), gpus=1)['disk']
    subprocess.run([sys.executable, ROOT / 'tools/train.py', config], cwd=config.parent, check=True,
                   capture_output=True)
    folder = config.parent / 'work_dirs/tiny'
    checkpoints = sorted(folder.glob('epoch_*.pth'))
    assert len(checkpoints) == found['checkpoints'] == 2
    # Beside numbers there are names: 0.1 MB, in a checkpoint of 2.6 MB.
    assert os.path.getsize(checkpoints[-1]) == pytest.approx(found['checkpoint'], rel=0.05)
    logged = [path for path in folder.rglob('*.json') if path.name not in ('teachers.json', 'manifest.json')]
    lines = [line for path in folder.rglob('*.log') for line in path.read_text().splitlines(True) if '(train)' in line]
    assert len(lines) == 8
    assert sum(map(len, lines)) + sum(path.stat().st_size for path in logged) == pytest.approx(found['logs'], rel=0.1)
