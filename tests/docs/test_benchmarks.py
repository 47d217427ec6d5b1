"""What docs/benchmarks.md says is what docs/benchmarks.json holds, and the bars that the design is held to."""
import json
import re
from pathlib import Path

import pytest

from mmhdistill.analysis.benchmark import CASES

DOCS = Path(__file__).parents[2] / 'docs'
# Of float32: case -> time, memory.
BARS = {'loss-197': (0.75, 0.35), 'loss-2305': (0.45, 0.25), 'step-masked': (0.60, 0.50),
        'step-masked-kept': (0.47, None), 'step-unmasked': (1.0, 0.8)}


@pytest.fixture(scope='module')
def found():
    return json.loads((DOCS / 'benchmarks.json').read_text())


def render(found: dict) -> str:
    """What stands between the marks of the page."""
    machine, rows = found['machine'], {(row['name'], row['dtype']): row for row in found['rows']}
    lines = ['| | time, naive | time | memory, naive | memory | time, bfloat16 | memory, bfloat16 |',
             '|---|---:|---:|---:|---:|---:|---:|']
    for name in CASES:
        row, half = rows[name, 'float32'], rows[name, 'bfloat16']
        lines.append(f'| {name} | {1000 * row["seconds"]["naive"]:.0f} ms | {row["time_ratio"]:.2f}x | '
                     f'{row["mib"]["naive"]:.0f} MiB | {row["memory_ratio"]:.2f}x | {half["time_ratio"]:.2f}x | '
                     f'{half["memory_ratio"]:.2f}x |')
    growth, report = found['growth']['ratio'], found['report']
    return '\n'.join([
        f'{machine["device"]}, {machine["threads"]} threads, Python {machine["python"]}, torch {machine["torch"]}, '
        f'{machine["date"]}; medians of {found["rows"][0]["repeats"]}:', '', *lines, '',
        f'- Memory of the loss at four times the tokens, in blocks of 64 rows: {growth["ours"]:.1f}x; the naive way: '
        f'{growth["naive"]:.1f}x.',
        f'- Masker and hook that keep every token: {found["overhead"]["ratio"]:+.1%} of a step.',
        f'- A report of `DiversityReportHook` every {report["interval"]} steps: {report["ratio"]:.2%} of training.'])


def test_page__says_what_was_measured(found):
    said = re.search('<!-- results -->\n(.*?)\n<!-- end of results -->', (DOCS / 'benchmarks.md').read_text(), re.S)[1]
    assert said == render(found)


@pytest.mark.parametrize('name', CASES)
def test_bars__of_each_case(found, name):
    row, = (row for row in found['rows'] if (row['name'], row['dtype']) == (name, 'float32'))
    time, memory = BARS[name]
    assert row['repeats'] >= 5
    assert row['time_ratio'] == row['seconds']['ours'] / row['seconds']['naive'] <= time
    assert row['memory_ratio'] == row['mib']['ours'] / row['mib']['naive']
    assert memory is None or row['memory_ratio'] <= memory


def test_bars__of_growth_and_hooks(found):
    assert found['growth']['ratio']['ours'] <= 5 < found['growth']['ratio']['naive']
    assert found['overhead']['ratio'] <= 0.03
    assert found['report']['ratio'] <= 0.02
