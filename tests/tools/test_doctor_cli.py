"""tools/doctor.py."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def doctor(*args, cwd, path=()):
    """(exit code, output) of the tool; modules in ``path`` are found before those that are installed."""
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, [*path, ROOT])), 'OMP_NUM_THREADS': '1',
           'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, ROOT / 'tools/doctor.py', *args], capture_output=True, text=True, cwd=cwd,
                          env=env)
    assert 'Traceback' not in done.stderr
    return done.returncode, done.stdout


def test_doctor__torch_that_kills_the_process(tmp_path):
    # Whatever imports torch dies at once, and the tool does not.
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch/__init__.py').write_text('import os\nos.abort()\n')
    code, out = doctor('mmhdistill::quickstart/hdistill_vit-photos.py', '--work-dir', 'here', cwd=tmp_path,
                       path=[tmp_path])
    assert code == 1
    lines = [' '.join(line.split()) for line in out.splitlines()]
    for module in ('torch', 'torchvision', 'mmhdistill', 'mmengine', 'mmcv', 'mmpretrain'):
        assert f'{module} the process was killed by SIGABRT' in lines
    text = ' '.join(lines)
    assert 'FOUND torch: importing torch fails: the process was killed by SIGABRT.' in text
    assert 'FOUND config: mmhdistill::quickstart/hdistill_vit-photos.py cannot be looked at' in text
    assert f'mmhdistill 0.1.0, {ROOT}' in text
    assert lines[-1].endswith('things have to be cured; run this again then.')
    assert [path.name for path in tmp_path.iterdir()] == ['torch']


@pytest.mark.parametrize('args', [['--cfg-options', 'a'], ['--gpus', 'many'], ['a.py', 'b.py']])
def test_doctor__wrong_arguments(args, tmp_path):
    assert doctor(*args, cwd=tmp_path) == (2, '')


def test_doctor__where_mmhdistill_is_not_installed(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    # -S: without site-packages.
    done = subprocess.run([sys.executable, '-S', ROOT / 'tools/doctor.py', '--gpus', 'many'], capture_output=True,
                          text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.endswith("argument --gpus: invalid int value: 'many'\n")


@pytest.mark.slow
def test_doctor__environment_of_the_tests(config):
    code, out = doctor(str(config), '--cfg-options', 'train_cfg.max_epochs=3', cwd=config.parent)
    assert (code, out.splitlines()[-1]) == (0, 'Nothing is in the way of a run.')
    lines = [' '.join(line.split()) for line in out.splitlines()]
    checkpoints, = (line for line in lines if line.startswith('checkpoints'))
    assert checkpoints.endswith('each, 4 at a time')
    assert any(line.startswith('mmhdistill fine, ') for line in lines)
    assert any(line.startswith('work dir work_dirs/tiny, ') and line.endswith(' needed') for line in lines)
    assert not (config.parent / 'work_dirs').exists()
