import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_unknown_method__is_refused_before_anything_is_installed(tmp_path):
    run = subprocess.run(['bash', ROOT / 'tools/quickstart.sh', 'moco'], capture_output=True, text=True,
                         env=dict(PATH='/usr/bin:/bin', VENV=str(tmp_path / 'venv'), OUT=str(tmp_path / 'out')))
    assert run.returncode == 2 and 'hybrid|moma' in run.stderr and "'moco'" in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('method, results', [('hybrid', 'quickstart.json'), ('moma', 'quickstart-moma.json')])
def test_check__of_the_shipped_results_passes_and_of_spoilt_ones_fails(tmp_path, method, results):
    def check():
        tool = ROOT / 'tools/analysis/quickstart_report.py'
        return subprocess.run([sys.executable, tool, tmp_path, method, '--check'], capture_output=True, text=True)

    found = json.loads((ROOT / 'docs' / results).read_text())
    (tmp_path / f'{method}.json').write_text(json.dumps(found))
    assert check().returncode == 0
    found['random']['knn'] = 100.0
    (tmp_path / f'{method}.json').write_text(json.dumps(found))
    failed = check()
    assert failed.returncode == 1 and 'does not hold' in failed.stderr
