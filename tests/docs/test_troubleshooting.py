"""docs/troubleshooting.md: what it says can be typed, is run."""
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmhdistill.analysis import doctor
from tests.helpers import write_images

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs/troubleshooting.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', TEXT, re.S) for line in block.splitlines()]


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """Runs a command of the page, in a folder that has configs and no data."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)

    def run(command):
        _, tool, *words = shlex.split(command)
        monkeypatch.setattr(sys, 'argv', [tool, *words])
        runpy.run_path(str(ROOT / tool), run_name='__main__')

    return run


@pytest.mark.parametrize('command', [line for line in COMMANDS if 'tools/doctor.py' in line])
def test_doctor__commands(command, typed, tmp_path, monkeypatch, capsys):
    # The packages of the test's own environment are another test's.
    monkeypatch.setattr(doctor, '_TRIALS', {'mmhdistill': 'pass'})
    monkeypatch.setattr(doctor, 'find_conflicts', lambda environment: [])
    monkeypatch.setattr(doctor, 'disk_usage', lambda path: type('Usage', (), dict(free=2**40)))
    if 'configs/' in command:
        with pytest.raises(SystemExit, match='1'):
            typed(command)
        assert "'data/imagenet/train' is not there" in capsys.readouterr().out
        write_images(tmp_path / 'data/imagenet/train', [f'{index}.png' for index in range(2048)], size=8)  # a step
    with pytest.raises(SystemExit) as caught:
        typed(command)
    out = capsys.readouterr().out
    assert caught.value.code == 0, out
    assert out.endswith('Nothing is in the way of a run.\n')
    if 'configs/' in command:
        # Two that are kept, and one more while it is written.
        assert re.search(r'checkpoints +\d\.\d\d GiB each, 3 at a time\n', out)


def test_misspelt_setting__says_what_the_page_says(typed):
    command, = (line for line in COMMANDS if 'checkpont' in line)
    said, = re.findall(r'```text\n(.*?)\n```', TEXT, re.S)
    with pytest.raises(SystemExit) as caught:
        typed(command)
    assert f'\n{said} ' in str(caught.value)


def test_exit_codes__are_those_of_the_tool():
    rows = dict(re.findall(r'^\| (\d) \| (.*) \|$', TEXT, re.M))
    text = (ROOT / 'tools/doctor.py').read_text()
    assert list(rows) == ['0', '1', '2'] == re.findall(r'\b(\d) (?:when|for)', re.search(r'Exit code: (.*)', text)[1])


def test_forks__are_those_of_the_tests():
    pinned = set(re.findall(r'onedl-[\w]+==[\d.]+', TEXT))
    assert len(pinned) == 5
    assert pinned == set(re.findall(r'onedl-[\w]+==[\d.]+', (ROOT / 'tools/run_tests.sh').read_text()))


@pytest.mark.parametrize('suffix, code, runs', [
    ('.py', "open('PROOF', 'w')", True), ('.yaml', "x: !!python/object/apply:os.makedirs ['PROOF', 511, true]", True),
    ('.json', '{"x": "open(\'PROOF\', \'w\')"}', False)])
@pytest.mark.filterwarnings('ignore:unclosed file')
def test_config_files__run_code_as_the_page_says(suffix, code, runs, tmp_path):
    proof, path = tmp_path / 'ran', tmp_path / f'config{suffix}'
    path.write_text(code.replace('PROOF', str(proof)))
    Config.fromfile(path)
    assert proof.exists() is runs
