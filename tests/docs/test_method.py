"""What docs/method.md says that a run costs is what a plan says."""
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from mmhdistill.analysis.plan import plan

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r'^\| \[.*?\]\(\.\./(configs/.*?\.py)\) \| (.*) \|$', (ROOT / 'docs/method.md').read_text(), re.M)


def test_costs__of_five_recipes():
    assert len(ROWS) == 5


@pytest.mark.parametrize('config, cells', ROWS)
def test_costs__are_those_of_the_plan(config, cells):
    found = plan(Config.fromfile(ROOT / config))
    assert cells.split(' | ') == [
        f'{found["flops"]["this"]["total"] / 1e9:.1f}', f'{found["flops"]["ratio"]:.2f}',
        f'{found["memory"]["total"] / 2**30:.1f}', str(found['time']['batch'])]
