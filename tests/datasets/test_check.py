import os
import subprocess
import sys

import pytest

from mmhdistill.datasets import check
from mmhdistill.datasets.image_folder import PROBLEMS
from tests.datasets.image_files import bad_files, convertible, encoded, picture, write_corpus


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, 'argv', ['check', *map(str, words)])
    return check.main()


def good(folder, number=5):
    write_corpus(folder, {f'good-{index}.jpg': (encoded(picture(index), 'JPEG'), '') for index in range(number)})


@pytest.mark.parametrize('workers', [1, 3])
def test_check__lists_exactly_the_bad_files(workers, tmp_path, monkeypatch, capsys):
    bad = bad_files(each=9)
    write_corpus(tmp_path / 'b', bad)
    write_corpus(tmp_path / 'a', {name: (content, None) for name, (content, _) in convertible().items()})
    good(tmp_path)
    (tmp_path / 'loop').symlink_to(tmp_path)
    assert run(monkeypatch, tmp_path, '--workers', workers) == 1
    out, err = capsys.readouterr()
    lines = [line.split('\t') for line in out.splitlines()]
    assert all(len(line) == 3 and line[2] for line in lines)
    assert lines[0][:2] == ['symlink loop', f'{tmp_path}/loop']
    assert [line[:2] for line in lines[1:]] == [[problem, f'{tmp_path}/b/{name}']
                                                for name, (_, problem) in sorted(bad.items())]
    found = [problem for _, problem in bad.values()] + ['symlink loop']
    found += [problem for _, problems in convertible().values() for problem in problems]
    totals = err.splitlines()
    assert totals[-1] == f'{len(bad) + len(convertible()) + 6} paths, of which {len(bad) + 1} cannot be used'
    assert [line.partition(': ')[0] for line in totals[:-1]] == [
        f'{found.count(problem)} {problem}' for problem in PROBLEMS if problem in found]


def test_check__all_good(tmp_path, monkeypatch, capsys):
    good(tmp_path)
    write_corpus(tmp_path / 'a', {name: (content, None) for name, (content, _) in convertible().items()})
    assert run(monkeypatch, tmp_path) == 0
    out, err = capsys.readouterr()
    assert out == '' and err.splitlines()[-1] == f'{len(convertible()) + 5} paths, of which 0 cannot be used'


def test_check__a_name_and_a_detail_of_several_lines_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / os.fsdecode(b'a\n\xff.jpg')).write_bytes(b'')
    assert run(monkeypatch, tmp_path) == 1
    assert capsys.readouterr().out == f'empty\t{tmp_path}/a\\x0a\\xff.jpg\tthe file has no bytes\n'


@pytest.mark.parametrize('words, message', [
    (['missing'], "'missing' cannot be read: [Errno 2] No such file or directory: 'missing/'. Give the folder of"),
    (['.'], "no image in '.': expected files ending in .jpg, .jpeg, .png"),
    (['.', '--workers', '0'], '--workers 0: give at least 1 thread')])
def test_check__nothing_to_check(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_check__exit_code_for_scripts(tmp_path):
    good(tmp_path, 1)
    (tmp_path / 'empty.jpg').write_bytes(b'')
    command = [sys.executable, '-m', 'mmhdistill.datasets.check', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    # The maintained fork of mmengine says something where it is imported.
    said = done.stdout.removeprefix('Could not import OneDL\n')
    assert (done.returncode, said) == (1, f'empty\t{tmp_path}/empty.jpg\tthe file has no bytes\n')
