"""docs/long-runs.md: what it says can be typed, is run."""
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmhdistill.engine import BFloat16OptimWrapper, NonFiniteSentinel, ResumableRunner, SeekableEpochLoop, StopOnSignal
from mmhdistill.engine.manifest import _SAMPLES
from tests.tools.conftest import write_config
from tests.tools.test_train_cli import free_port, iterations, run

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs/long-runs.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', TEXT, re.S) for line in block.splitlines()]
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.S)
# Its gradient is infinite in one iteration.
ROOT_HOOK = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RootOfZero(Hook):

    def before_run(self, runner):
        model = runner.model
        plain = model.loss

        def loss(images):
            losses = plain(images)
            if runner.iter == 2:
                losses['loss/root'] = (model.backbone.cls_token * 0).sum().sqrt()
            return losses

        model.loss = loss
"""


def typed(command, words):
    """The words of a command, some of them replaced by what a test has in their place."""
    found = [str(words.get(word, word)) for word in shlex.split(command, comments=True)]
    return [sys.executable if word == 'python' else ROOT / word if word.startswith('tools/') else word
            for word in found]


def logs(folder):
    return [path.read_text() for path in sorted(folder.glob('work_dirs/tiny/*/*.log'))]


def test_commands__are_those_that_are_run_here():
    tools = [re.search(r'tools/(\w+)', command)[1] for command in COMMANDS]
    assert tools == ['dist_train', 'train', 'replay', 'replay']


@pytest.mark.slow
def test_resume__commands_on_a_folder_that_was_moved(tmp_path, capsys):
    old, new = tmp_path / 'old', tmp_path / 'new'
    old.mkdir()
    new.mkdir()
    config = write_config(tmp_path)
    run([sys.executable, ROOT / 'tools/train.py', config, '--cfg-options', 'train_cfg.max_epochs=1'], old)
    (old / 'work_dirs').rename(new / 'work_dirs')
    # Half the steps of one process.
    here = {'configs/hdistill/vit-b_clip-mae_300e.py': config, '8': 2}
    run(typed(COMMANDS[0], here), new, PORT=free_port())
    assert list(iterations(logs(new)[-1])) == [(2, 1), (2, 2)]
    changed = ['--cfg-options', 'train_cfg.max_epochs=3', 'model.losses.relation.loss_weight=0.5']
    said = run([*typed(COMMANDS[1], dict(CONFIG=config)), *changed], new)
    assert list(iterations(logs(new)[-1])) == [(3, step) for step in range(1, 5)]
    assert 'model.losses.relation.loss_weight: 0.3 -> 0.5' in said
    # What the page reads in a checkpoint.
    block, = (block for block in BLOCKS if 'manifest' in block)
    checkpoint = new / 'work_dirs/tiny/epoch_3.pth'
    capsys.readouterr()
    exec(block.replace('epoch_300.pth', str(checkpoint)).replace("['clip']", "['mae']"), {})
    digest = hashlib.sha256((tmp_path / 'data/mae.pth').read_bytes()).hexdigest()
    assert capsys.readouterr().out == f'{digest}\n'


@pytest.mark.slow
def test_replay__commands_and_checkpoints_by_iteration(tmp_path):
    config = write_config(tmp_path)
    text = config.read_text()
    for before, now in (("'mmhdistill.auto_amp_optim_wrapper'", "'mmhdistill.BFloat16OptimWrapper'"),
                        ("schedule='linear')]", "schedule='linear'), dict(type='RootOfZero')]")):
        assert before in text
        text = text.replace(before, now)
    config.write_text(f"{text}\ncustom_imports = dict(imports=['mmhdistill', 'root_of_zero'])\n")
    (tmp_path / 'root_of_zero.py').write_text(ROOT_HOOK)
    path = os.pathsep.join(map(str, (ROOT, tmp_path)))
    options, = re.findall(r'`--cfg-options (default_hooks\.checkpoint\.[^`]*)`', TEXT)
    run([sys.executable, ROOT / 'tools/train.py', config, '--cfg-options', *options.replace('=1000', '=3').split()],
        tmp_path, PYTHONPATH=path)
    work = tmp_path / 'work_dirs/tiny'
    assert sorted(file.name for file in work.glob('*.pth')) == ['iter_3.pth', 'iter_6.pth', 'iter_8.pth']
    file, = (work / 'nonfinite').glob('*.json')
    record = json.loads(file.read_text())
    assert file.name == 'iter_2_rank_0.json' and record['gradients'] == ['backbone.cls_token']
    assert all(math.isfinite(x) for x in record['losses'].values()) and record['losses']['loss'] > 0

    here = {'CONFIG': config, 'work_dirs/NAME/nonfinite/iter_4711_rank_0.json': file}
    again, precise = (run(typed(command, here), tmp_path, PYTHONPATH=path) for command in COMMANDS[2:])
    for said in (again, precise):
        assert f'iteration 3, process 0, samples {[index for index, _ in record["samples"]]}' in said
        assert '\ngradients that are not finite: backbone.cls_token\n' in said
        assert re.search(r'^backbone\.layers\.0 +\S+ to \S+ +\S+ to \S+ +0$', said, re.M)
    for name, value in record['losses'].items():
        assert f'\n{name}: {value:.6g} (recorded: {value:.6g})\n' in again
    # In float32 it is the same step with other roundings.
    pairs = [tuple(map(float, pair)) for pair in re.findall(r'^\S+: (\S+) \(recorded: (\S+)\)$', precise, re.M)]
    assert len(pairs) == len(record['losses']) and any(value != recorded for value, recorded in pairs)
    assert all(value == pytest.approx(recorded, rel=0.1) for value, recorded in pairs)


def test_own_config__has_the_runner_hooks_and_precision_of_the_page(tmp_path):
    block, = (block for block in BLOCKS if 'runner_type' in block)
    hooks, = re.findall(r'`(default_hooks = .*?)`', TEXT)
    wrapper, = re.findall(r'`(optim_wrapper = .*?), \.\.\.\)`', TEXT)
    (tmp_path / 'own.py').write_text(f'{block}\n{hooks}\n{wrapper}, optimizer=dict(type="SGD", lr=0.1))\n')
    cfg, other = Config.fromfile(tmp_path / 'own.py'), Config.fromfile(write_config(tmp_path))
    for key in ('model', 'train_dataloader', 'train_cfg', 'default_scope'):
        cfg[key] = other[key]
    cfg.work_dir = str(tmp_path / 'work')
    runner = RUNNERS.build(cfg)
    assert type(runner) is ResumableRunner and type(runner.train_loop) is SeekableEpochLoop
    kinds = {type(hook).__name__ for hook in runner.hooks}
    assert {'WholeCheckpointHook', 'RunManifest', 'NonFiniteSentinel'} <= kinds and 'StopOnSignal' not in kinds
    assert type(runner.build_optim_wrapper(runner.optim_wrapper)) is BFloat16OptimWrapper


def test_numbers__are_those_of_the_code():
    text = ' '.join(TEXT.split())
    most = inspect.signature(NonFiniteSentinel).parameters['max_skips'].default
    assert f'`default_hooks.sentinel.max_skips={most}`' in text
    assert f'at most {_SAMPLES:,} file names' in text
    assert f'({128 + signal.SIGTERM}, {128 + signal.SIGINT})' in text
    assert f'one checkpoint, `{StopOnSignal().filename}`, is written' in text
