"""What docs/benchmarks.md says is what docs/benchmarks.json holds, and the bars that the design is held to."""
import json
import re
from pathlib import Path

import pytest
import torch

from mmhdistill.analysis.benchmark import CASES, small_distiller
from mmhdistill.registry import MODELS

DOCS = Path(__file__).parents[2] / 'docs'
# Of float32: case -> time, memory.
BARS = {'loss-197': (0.75, 0.35), 'loss-2305': (0.45, 0.25), 'step-masked': (0.60, 0.50),
        'step-masked-kept': (0.47, None), 'step-unmasked': (1.0, 0.8)}


@pytest.fixture(scope='module')
def found():
    return json.loads((DOCS / 'benchmarks.json').read_text())


@pytest.fixture(scope='module')
def trained() -> int:
    with torch.device('meta'):
        student = MODELS.build(small_distiller(None)['backbone'])
    return sum(parameter.numel() for parameter in student.parameters())


def render(found: dict) -> str:
    """What stands between the marks of the page."""
    machine, rows = found['machine'], {row['name']: row for row in found['rows']}
    lines = ['| | time, naive | time | memory, naive | memory | time, bfloat16 | memory, bfloat16 |',
             '|---|---:|---:|---:|---:|---:|---:|']
    for name in CASES:
        row, half = rows[name], rows[name]['bfloat16']
        lines.append(f'| {name} | {1000 * row["seconds"]["naive"]:.0f} ms | {row["time_ratio"]:.2f}x | '
                     f'{row["mib"]["naive"]:.0f} MiB | {row["memory_ratio"]:.2f}x | {half["time_ratio"]:.2f}x | '
                     f'{half["memory_ratio"]:.2f}x |')
    growth, report, data = found['growth']['ratio'], found['report'], found['data']
    return '\n'.join([
        f'{machine["device"]}, {machine["threads"]} threads, Python {machine["python"]}, torch {machine["torch"]}, '
        f'{machine["date"]}; medians of {found["rows"][0]["repeats"]}:', '', *lines, '',
        f'- Memory of the loss at four times the tokens, in blocks of 64 rows: {growth["ours"]:.1f}x; the naive way: '
        f'{growth["naive"]:.1f}x.',
        f'- Masker and hook that keep every token: {found["overhead"]["ratio"]:+.1%} of a step.',
        f'- A report of `DiversityReportHook` every {report["interval"]} steps: {report["ratio"]:.2%} of training.',
        f'- A worker reads and augments {data["rate"]:.0f} photographs of {data["kilobytes"]:.0f} kB a second.'])


def test_page__says_what_was_measured(found):
    said = re.search('<!-- results -->\n(.*?)\n<!-- end of results -->', (DOCS / 'benchmarks.md').read_text(), re.S)[1]
    assert said == render(found)


@pytest.mark.parametrize('name', CASES)
def test_bars__of_each_case(found, name, trained):
    row, = (row for row in found['rows'] if row['name'] == name)
    assert row['dtype'] == 'float32'
    time, memory = BARS[name]
    assert row['repeats'] >= 5
    assert row['time_ratio'] == row['seconds']['ours'] / row['seconds']['naive'] <= time
    assert row['memory_ratio'] == row['mib']['ours'] / row['mib']['naive']
    assert memory is None or row['memory_ratio'] <= memory
    if name.startswith('step'):
        # Gradients and AdamW's states of the student, which any way has to hold.
        assert min(row['mib'].values()) > 3 * 4 * trained / 2**20


def test_bars__of_growth_and_hooks(found):
    assert found['growth']['ratio']['ours'] <= 5
    assert found['growth']['ratio']['ours'] < found['growth']['ratio']['naive']
    assert found['overhead']['ratio'] <= 0.03
    assert found['report']['ratio'] <= 0.02
