import json
import os
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


@pytest.mark.parametrize('options', [[], ['--check']])
def test_report__before_the_quick_start_says_what_to_run(tmp_path, options):
    run = subprocess.run([sys.executable, ROOT / 'tools/analysis/quickstart_report.py', tmp_path, 'moma', *options],
                         capture_output=True, text=True)
    assert run.returncode == 1 and 'run bash tools/quickstart.sh moma first' in run.stderr
    assert 'Traceback' not in run.stderr


# Stands for the virtual environment's Python: notes what it was asked to do, and leaves what training leaves.
STUB = r"""#!/usr/bin/env bash
set -e
resume=
if [[ ${!#} = --resume ]]; then resume=+; set -- "${@:1:$#-1}"; fi
echo "$(basename "$1") $(basename "$2")$resume" >> "$CALLS"
if [[ $1 = *train.py ]]; then
    work=$4
    for option in "${@:6}"; do
        [[ $option = *[\ ,]* ]] && { echo "a space or comma in $option" >> "$CALLS"; exit 1; }
        [ -e "${option#*=}" ] || { echo "no file ${option#*=}" >> "$CALLS"; exit 1; }
    done
    mkdir -p "$work"
    ls "$work" >> "$FOUND"
    if [[ $resume && -e $work/epoch_1.pth ]]; then exit; fi # it had come to its end
    if [ -e "$KILL" ]; then touch "$work/interrupted.pth"; echo SIGTERM; exit 143; fi
    echo "$RANDOM weights of $2" > "$work/epoch_1.pth"
    echo "$work/epoch_1.pth" > "$work/last_checkpoint"
    echo 'Epoch(train) [1][1/1]'
fi
if [[ $1 = *write_photo_crops.py ]]; then mkdir -p "$2/train"; fi
"""


@pytest.fixture
def quickstart(tmp_path):
    """Run the script with a stub of Python in a folder with a space and a comma; what it trained, "+" if resumed."""
    calls, venv = tmp_path / 'calls', tmp_path / 'my, venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'installed').touch()
    (venv / 'bin/python').write_text(STUB)
    (venv / 'bin/python').chmod(0o755)

    def run(method):
        calls.write_text('')
        run.found.write_text('')
        done = subprocess.run(
            ['bash', ROOT / 'tools/quickstart.sh', method], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, 'CALLS': str(calls), 'VENV': str(venv), 'OUT': 'my, out', 'FOUND': str(run.found),
                 'KILL': str(run.kill)})
        assert done.returncode == int(run.kill.exists()), done.stderr
        lines = calls.read_text().splitlines()
        assert lines[0].startswith('write_photo_crops')
        assert lines[-1].startswith('quickstart_report') != run.kill.exists()
        return [line.split()[1].replace('_vit-photos.py', '') for line in lines[1:] if line.startswith('train.py')]

    run.out, run.found, run.kill = tmp_path / 'my, out', tmp_path / 'found', tmp_path / 'kill'
    return run


def test_steps__finished_ones_are_kept_and_shared_between_methods(quickstart):
    assert quickstart('hybrid') == ['supervised', 'mae', 'cl-only', 'hdistill']
    assert quickstart('hybrid') == []
    assert quickstart('moma') == ['mocov3', 'moma_moco-to-mae', 'moma_mae-to-moco', 'moma_moco-mae']
    assert quickstart('moma') == []


def test_steps__students_of_a_new_teacher_are_trained_anew(quickstart):
    quickstart('hybrid')
    for name in ('begun', 'finished'):
        (quickstart.out / 'mae' / name).unlink()
    assert quickstart('hybrid') == ['mae', 'cl-only', 'hdistill']


def test_steps__one_that_was_interrupted_goes_on(quickstart):
    quickstart.kill.touch()
    assert quickstart('hybrid') == ['supervised']
    log = quickstart.out / 'supervised.log'
    assert log.read_text() == 'SIGTERM\n'
    quickstart.kill.unlink()
    assert quickstart('hybrid') == ['supervised+', 'mae', 'cl-only', 'hdistill']
    assert 'interrupted.pth' in quickstart.found.read_text()
    assert log.read_text().startswith('SIGTERM\nEpoch(train)')
    assert quickstart('hybrid') == []


def test_steps__one_that_was_stopped_at_its_end_is_finished(quickstart):
    """There is nothing left to train, and no line of it."""
    quickstart('hybrid')
    (quickstart.out / 'mae/finished').unlink()
    assert quickstart('hybrid') == ['mae+']
    assert quickstart('hybrid') == []


def test_steps__nothing_of_other_configs_is_resumed(quickstart):
    quickstart('moma')
    step = quickstart.out / 'mae-to-moco'
    (step / 'interrupted.pth.sha256').touch()
    (step / '20260101_000000').mkdir()
    (step / 'mine').touch()
    for name in ('begun', 'finished'):
        (step / name).write_text('of other configs')
    assert quickstart('moma') == ['moma_mae-to-moco']
    assert quickstart.found.read_text().split() == ['begun', 'mine']
