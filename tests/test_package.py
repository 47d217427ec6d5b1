"""What a wheel of the project holds."""
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    # A clone: building leaves build/ and an egg-info behind.
    source, out = tmp_path_factory.mktemp('source') / 'mmhdistill', tmp_path_factory.mktemp('wheel')
    subprocess.run(['git', 'clone', '-q', '--no-local', ROOT, source], check=True)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, source],
                   check=True)
    with zipfile.ZipFile(next(out.glob('mmhdistill-*.whl'))) as archive:
        archive.source = source
        yield archive


def test_wheel__carries_configs_and_tools_under_mim(wheel):
    names = wheel.namelist()
    carried = [path.relative_to(wheel.source) for folder in ('configs', 'tools')
               for path in (wheel.source / folder).rglob('*') if path.suffix in ('.py', '.sh', '.yml')]
    assert len(carried) > 15
    for name in carried:
        # A copy, not a link that points out of the wheel.
        assert wheel.read(f'mmhdistill/.mim/{name}') == (wheel.source / name).read_bytes()
    assert 'mmhdistill/.mim/model-index.yml' in names
    assert not [name for name in names if name.startswith('tests/')]


def test_wheel__metadata(wheel):
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith('METADATA'))).decode()
    for line in ('Name: mmhdistill', 'License: Apache-2.0', 'Requires-Python: >=3.10',
                 'Requires-Dist: mmpretrain<2,>=1.2.0'):
        assert line in metadata
    assert 'Requires-Dist: mmdet<4,>=3.3.0; extra == "det"' in metadata.replace("'", '"')


def test_wheel__configs_resolve_by_package_name(wheel, tmp_path):
    wheel.extractall(tmp_path)
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'mmhdistill::hdistill/vit-b_clip-mae_300e.py'\n")
    code = ('import mmhdistill; from mmengine.config import Config; '
            f'c = Config.fromfile({str(config)!r}); print(mmhdistill.__file__, c.train_cfg.max_epochs)')
    environment = {'PYTHONPATH': str(tmp_path), 'PATH': '/usr/bin'}
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                         check=True).stdout
    assert out.strip().endswith('300') and str(tmp_path) in out
