import os
import socket

import pytest

from mmhdistill.datasets.listing import list_folders, list_images, printable

ENDINGS = ('.jpg', '.PNG')


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')


def test_list_images__sorted_nested_whatever_case(tmp_path):
    touch(tmp_path, 'b/2.jpg', 'b/10.JPG', 'a/deep/er/x.png', 'c.Jpg', 'readme.txt', 'a/jpg', 'b.jpg/y.jpg')
    listing = list_images(str(tmp_path), ENDINGS)
    assert listing.names == ['a/deep/er/x.png', 'b.jpg/y.jpg', 'b/10.JPG', 'b/2.jpg', 'c.Jpg']
    assert listing.problems == []


def test_list_images__hidden_names_are_left_out(tmp_path):
    touch(tmp_path, '1.jpg', '._1.jpg', '.ipynb_checkpoints/1-checkpoint.jpg', 'a/.b/2.jpg')
    assert list_images(str(tmp_path), ENDINGS) == (['1.jpg'], [])


def test_list_images__links(tmp_path):
    touch(tmp_path, 'elsewhere/1.jpg', 'elsewhere/2.jpg')
    folder = tmp_path / 'folder'
    touch(folder, 'a/0.jpg')
    (folder / 'b').symlink_to(tmp_path / 'elsewhere')
    (folder / 'c').symlink_to(tmp_path / 'elsewhere')  # twice the same is no loop
    (folder / '3.jpg').symlink_to(tmp_path / 'elsewhere/1.jpg')
    assert list_images(str(folder), ENDINGS) == (['3.jpg', 'a/0.jpg', 'b/1.jpg', 'b/2.jpg', 'c/1.jpg', 'c/2.jpg'], [])


def test_list_images__loops_end(tmp_path):
    touch(tmp_path, 'a/1.jpg', 'b/2.jpg')
    (tmp_path / 'a/up').symlink_to(tmp_path)
    (tmp_path / 'a/self').symlink_to(tmp_path / 'a')
    (tmp_path / 'a/to_b').symlink_to(tmp_path / 'b')
    (tmp_path / 'b/to_a').symlink_to(tmp_path / 'a')
    (tmp_path / 'b/3.jpg').symlink_to('3.jpg')
    names, problems = list_images(str(tmp_path), ENDINGS)
    assert names == ['a/1.jpg', 'a/to_b/2.jpg', 'b/2.jpg', 'b/to_a/1.jpg']
    assert {problem for problem, _, _ in problems} == {'symlink loop'}
    found = {os.path.relpath(path, tmp_path): detail for _, path, detail in problems}
    assert set(found) == {'a/up', 'a/self', 'a/to_b/to_a', 'a/to_b/3.jpg', 'b/3.jpg', 'b/to_a/up', 'b/to_a/self',
                          'b/to_a/to_b'}
    assert found['a/up'] == f'it links to {tmp_path}'
    assert 'symbolic links' in found['b/3.jpg']


def test_list_images__no_files(tmp_path):
    touch(tmp_path, 'good.jpg')
    (tmp_path / 'nowhere.jpg').symlink_to(tmp_path / 'missing.jpg')
    (tmp_path / 'nowhere.txt').symlink_to(tmp_path / 'missing.txt')
    os.mkfifo(tmp_path / 'pipe.jpg')  # opening it would wait for ever
    names, problems = list_images(str(tmp_path), ENDINGS)
    assert names == ['good.jpg']
    assert [(problem, os.path.basename(path)) for problem, path, _ in problems] == [
        ('unreadable', 'nowhere.jpg'), ('unreadable', 'pipe.jpg')]
    assert 'No such file' in problems[0][2] and problems[1][2] == 'neither a file nor a folder'


def test_list_images__socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind('s.jpg')
        assert list_images('.', ENDINGS) == ([], [('unreadable', './s.jpg', 'neither a file nor a folder')])


def test_list_images__folder_that_may_not_be_read(tmp_path, monkeypatch):
    touch(tmp_path, 'a/1.jpg', 'secret/2.jpg')
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip('/').endswith('secret'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)  # root may read everything
    names, problems = list_images(str(tmp_path), ENDINGS)
    assert names == ['a/1.jpg']
    assert problems == [('unreadable', f'{tmp_path}/secret', f"[Errno 13] Permission denied: '{tmp_path}/secret'")]
    with pytest.raises(PermissionError):
        list_images(str(tmp_path / 'secret'), ENDINGS)


def test_list_images__missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_images(str(tmp_path / 'missing'), ENDINGS)


def test_list_images__names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b'caf\xe9 \xff.jpg')
    touch(tmp_path, name, 'käse.jpg')
    names, problems = list_images(str(tmp_path), ENDINGS)
    assert sorted(map(printable, names)) == [r'caf\xe9 \xff.jpg', 'käse.jpg'] and problems == []
    assert name in names and os.path.exists(tmp_path / name)


def test_printable__control_characters():
    assert printable('a\n\x1b[31m\tb.jpg') == r'a\x0a\x1b[31m\x09b.jpg'


def test_list_folders(tmp_path):
    touch(tmp_path, 'b/1.jpg', 'a/1.jpg', '.hidden/1.jpg', '1.jpg')
    (tmp_path / 'c').symlink_to(tmp_path / 'a')
    (tmp_path / 'loop').symlink_to(tmp_path)
    (tmp_path / 'nowhere').symlink_to(tmp_path / 'missing')
    assert list_folders(str(tmp_path)) == ['a', 'b', 'c']
