import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from mmhdistill.functional import relative_attention

SCRIPT = Path(__file__).parents[2] / 'benchmarks/vitdet_memory.py'


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_textbook_attention__computes_what_ours_does():
    spec = spec_from_file_location('vitdet_memory', SCRIPT)
    benchmark = module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    q, k, v = (random(2, 3, 20, 8, seed=seed) for seed in range(3))
    tables, inside = (random(7, 8, seed=4), random(9, 8, seed=5)), torch.arange(40).reshape(2, 20) % 7 > 0
    for arguments in ((tables, None), (tables, inside), (None, None)):
        ours, textbook = (f(q, k, v, (4, 5), *arguments) for f in (relative_attention, benchmark.textbook_attention))
        assert (ours - textbook).abs().max() < 1e-12


@pytest.mark.slow
def test_vitdet__windows_and_fused_attention_take_half_the_memory_of_the_textbook_at_most():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r'^\| (.+) \| (\d+) \| (\d\.\d\d) \|$', done.stdout, re.MULTILINE)
    found = {title: int(size) for title, size, _ in rows}
    assert list(found) == ['windows of 14', 'global, fused', 'global, textbook']
    windows, fused, textbook = found.values()
    # 4096 patches, 6 heads, float32: each of the 4 blocks keeps its 384 MiB of weights.
    assert textbook > 4 * 384
    assert windows <= 0.5 * textbook and fused <= 0.5 * textbook
    assert windows < fused
