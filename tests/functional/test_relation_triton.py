"""The cases are in ``relation_triton_cases.py``. Triton's interpreter has to be on before Triton is imported, so there
they run in a process of their own; where CUDA is, natively here as well."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmhdistill.functional import relation_triton

if torch.cuda.is_available():
    from .relation_triton_cases import *  # noqa: F403

ROOT = Path(__file__).parents[2]

WITHOUT_TRITON = '''
import importlib.util, sys

class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ModuleNotFoundError("No module named 'triton'")

sys.meta_path.insert(0, Hiding())

import torch
from mmhdistill.functional import relation_kl, relation_smooth_l1

a, b = (torch.arange(6.0).view(1, 3, 2).requires_grad_() for _ in range(2))
for distance in (relation_kl, relation_smooth_l1, relation_kl):
    distance(a, b, b.detach().flip(1), b.detach(), heads=1).backward()
print(relation_kl(a, b, b.detach().flip(1), b.detach(), heads=1, rows=3).item())
'''


def run(*args, **env):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_relation_triton__in_the_interpreter():
    done = run('-m', 'pytest', '-p', 'no:cacheprovider', '-W', 'ignore::RuntimeWarning',
               'tests/functional/relation_triton_cases.py', TRITON_INTERPRET='1')
    assert done.returncode == 0, done.stdout[-6000:]
    assert 'skipped' not in done.stdout


def test_relation_triton__without_triton_pytorch_computes_and_says_so():
    done = run('-c', WITHOUT_TRITON, TRITON_INTERPRET='1')
    assert done.returncode == 0, done.stderr
    assert done.stderr == ('Token relations are computed by PyTorch, not by the fused kernel: Triton '
                           "cannot be imported (No module named 'triton').\n")
    assert float(done.stdout) > 0


def compiled(kernel, dtype, dim, teacher_dim, ones=(), target=80, **constants):
    """As a launch would compile it, with no GPU: ``ones`` are the integers that equal 1, which Triton treats apart."""
    pointer = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}[dtype]
    options = relation_triton.tile_options((dtype, ) * 4, dim, teacher_dim)
    launch = {name: options.pop(name) for name in ('num_warps', 'num_stages')}
    constants = {**options, **constants, **dict.fromkeys(ones, 1)}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = 'constexpr'
        elif name in ('value', 'softmax', 'grad_output'):
            signature[name] = '*fp32'
        elif name in ('scale', 'teacher_scale', 'beta', 'factor'):
            signature[name] = 'fp32'
        else:
            signature[name] = 'i32' if name.endswith(('_image', '_token', '_channel', 'heads', 'tokens')) else pointer
    # Pointers and strides are multiples of 16 elements.
    aligned = {(i, ): [['tt.divisibility', 16]] for i, (name, kind) in enumerate(signature.items())
               if kind.startswith('*') or name.endswith(('_image', '_token')) and kind == 'i32'}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget('cuda', target, 32),
                          options=launch)


CONTIGUOUS = [[f'{x}_channel' for x in names] for names in (('a', 'b', 'ta', 'tb'),
                                                            ('own', 'other', 'town', 'tother', 'grad'))]


@pytest.mark.parametrize('kl, dtype, dim, teacher_dim, target', [
    (True, torch.float32, 20, 64, 80),
    (False, torch.float32, 20, 64, 80),
    (True, torch.bfloat16, 64, 96, 90),
    (False, torch.bfloat16, 64, 96, 90),
    (True, torch.float16, 256, 64, 80),
])
def test_relation_triton__compiles_for_gpus(kl, dtype, dim, teacher_dim, target, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    # A single head and a single token are constants to Triton.
    value_ones, gradient_ones = (ones + ['heads', 'tokens'] * (target == 90) for ones in CONTIGUOUS)
    kernels = [compiled(relation_triton._value_kernel, dtype, dim, teacher_dim, value_ones, target, KL=kl)]
    for queries in (True, False):
        kernels.append(compiled(relation_triton._gradient_kernel, dtype, dim, teacher_dim, gradient_ones, target, KL=kl,
                                OWN_ARE_QUERIES=queries))
    for kernel in kernels:
        # A block of threads may have 99 KB on the smallest GPUs of compute capability 8.
        assert kernel.metadata.shared < 72 * 1024
        instructions = re.findall(r'mma\S*', kernel.asm['ptx'])
        assert not any('tf32' in x for x in instructions)
        assert bool(instructions) == (dtype != torch.float32)
