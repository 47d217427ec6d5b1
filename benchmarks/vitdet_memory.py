"""Memory of one step of ViTDet at 1024 px: windows, our fused global attention, and global attention by the textbook.

All have decomposed relative positions; the textbook's adds them to the scores as an N x N tensor of each head. Each
case runs in a process of its own, whose peak resident memory is measured over one forward and backward pass on CPU.

    python benchmarks/vitdet_memory.py
"""
import argparse
import subprocess
import sys

import torch

import mmhdistill  # noqa: F401  (its cures come before other packages)
from mmhdistill.analysis.benchmark import resident
from mmhdistill.functional import relative_embeddings
from mmhdistill.models import ViTDet
from mmhdistill.models.backbones import vitdet

CASES = {'windows': 'windows of 14', 'fused': 'global, fused', 'textbook': 'global, textbook'}


def textbook_attention(q, k, v, grid, tables=None, inside=None, dropout=0.0):
    """What ``relative_attention`` computes, by the formula: scores, bias and weights are (B, heads, h w, h w)."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1]**-0.5
    if tables is not None:
        image = q.unflatten(2, grid)
        rows = torch.einsum('bnhwc,hkc->bnhwk', image, relative_embeddings(tables[0], grid[0]))
        columns = torch.einsum('bnhwc,wkc->bnhwk', image, relative_embeddings(tables[1], grid[1]))
        scores = scores + (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)
    if inside is not None:
        scores = scores.masked_fill(~inside[:, None, None], float('-inf'))
    return scores.softmax(dim=-1) @ v


def step(case: str, size: int = 1024, width: int = 384, heads: int = 6, depth: int = 4) -> float:
    """Peak memory of one image's forward and backward pass beyond that before it, MiB."""
    torch.manual_seed(0)
    arch = dict(embed_dims=width, num_layers=depth, num_heads=heads, feedforward_channels=4 * width)
    blocks = [] if case == 'windows' else list(range(depth))
    if case == 'textbook':
        vitdet.relative_attention = textbook_attention
    model = ViTDet(arch, img_size=size, global_blocks=blocks)
    image = torch.randn(1, 3, size, size)
    before = resident('VmHWM')
    model(image)[0].square().mean().backward()
    return resident('VmHWM') - before


def measure(case: str) -> float:
    """:func:`step` in a process of its own: a peak never falls."""
    done = subprocess.run([sys.executable, __file__, '--case', case], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', choices=CASES, help='this one alone, in this process: MiB')
    case = parser.parse_args().case
    if case:
        print(step(case))
        return
    print('Width 384, 6 heads, 4 blocks, one image of 1024 px, float32, forward and backward:\n')
    print('| attention | MiB | of the textbook\'s |\n|---|---:|---:|')
    found = {case: measure(case) for case in CASES}
    for case, title in CASES.items():
        print(f'| {title} | {found[case]:.0f} | {found[case] / found["textbook"]:.2f} |')


if __name__ == '__main__':
    main()
