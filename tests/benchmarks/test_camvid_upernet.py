import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import build_distiller, tiny_student, write_camvid

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_benchmark__compares_the_student_with_random_weights(tmp_path):
    write_camvid(tmp_path / 'camvid')
    arch = dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=256)
    student = build_distiller(backbone=tiny_student(arch=arch, patch_size=4)).backbone
    torch.save(dict(state_dict={f'backbone.{key}': x for key, x in student.state_dict().items()}),
               tmp_path / 'student.pth')
    command = [sys.executable, str(ROOT / 'benchmarks/camvid_upernet.py'), str(tmp_path / 'student.pth'),
               str(tmp_path / 'camvid'), '--iters', '2', '--out', str(tmp_path / 'out')]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r'^\| (\w+) weights \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$', done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ['distilled', 'random']
    assert all(0 <= float(score) <= 100 for row in rows for score in row[1:])
    # Two steps of AdamW at 5e-4 * 0.75 ** 4 at most move a weight of layer 0 by less than 4e-4.
    key = 'layers.0.attn.qkv.weight'
    moved = {start: (torch.load(tmp_path / f'out/{start}-0/iter_2.pth', weights_only=False)['state_dict'][
        f'backbone.{key}'] - student.state_dict()[key]).abs().max() for start in ('distilled', 'random')}
    assert 0 < moved['distilled'] < 4e-4
    assert moved['random'] > 0.1
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert again.returncode == 2
    assert 'distilled-0 is there already: give another --out, or remove it.' in again.stderr
