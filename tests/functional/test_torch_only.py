"""Each case runs in a process of its own: what is imported here cannot be made unfindable any more."""
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WITHOUT_OPENMMLAB = '''
import importlib.util, math, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmpretrain'):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert all(importlib.util.find_spec(name) is None for name in ('mmengine', 'mmcv', 'mmpretrain'))
try:
    import mmengine
except ModuleNotFoundError:
    pass
else:
    raise SystemExit('mmengine can still be imported')

import torch
import mmhdistill.functional as functional

a = torch.tensor([[[2.0], [4.0]]], dtype=torch.float64, requires_grad=True)
b = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
value = functional.relation_kl(a, b, torch.zeros_like(b), b, heads=1)
value.backward()
print(value.item(), *a.grad.flatten().tolist())
print(*(name for name in sys.modules if name.split('.')[0] in ('mmengine', 'mmcv', 'mmpretrain')))
'''


def run(code, **env):
    env = {**os.environ, **env}
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True)


def test_functional__imports_and_computes_with_torch_alone():
    done = run(WITHOUT_OPENMMLAB)
    assert done.returncode == 0, done.stderr
    numbers, loaded = done.stdout.split('\n')[:2]
    # Scores 2 and 4 of the second key against a teacher at (1/2, 1/2).
    p = [1 / (1 + math.exp(-s)) for s in (2.0, 4.0)]
    want = [sum(-math.log(4 * x * (1 - x)) / 4 for x in p), *((x - 0.5) / 2 for x in p)]
    for got, expected in zip(map(float, numbers.split()), want, strict=True):
        assert abs(got - expected) < 1e-12
    assert loaded == ''


def test_mmhdistill__import_leaves_detection_and_segmentation_alone(tmp_path):
    # Stand-ins that cannot be imported shadow the real packages, installed or not.
    for name in ('mmdet', 'mmseg'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text("raise SystemExit(f'{__name__} was imported')\n")
    control = run('import mmdet', PYTHONPATH=str(tmp_path))
    assert (control.returncode, control.stderr.strip()) == (1, 'mmdet was imported')
    code = "import sys, mmhdistill; print(sum(n.split('.')[0] in ('mmdet', 'mmseg') for n in sys.modules))"
    done = run(code, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, '0'), done.stderr
