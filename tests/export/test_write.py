"""What is written, what is never overwritten, and what a crash leaves."""
import pytest

from mmhdistill.export import TARGETS, export
from mmhdistill.export.write import Target

from .conftest import PREPROCESSOR


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('there', ['export', 'manifest'])
def test_export__never_over_what_is_there(make, tmp_path, target, there):
    checkpoint, _ = make()
    out = tmp_path / f'student{TARGETS[target].suffix}'
    old = out if there == 'export' else tmp_path / f'{out.name}.json'
    old.write_bytes(b'old')
    before = bytes_of(tmp_path)
    with pytest.raises(FileExistsError, match=f'{old} exists already: give another --out, or --force to replace it'):
        export(checkpoint, target, out=out)
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize('target', ['timm', 'huggingface'])
def test_export__force_replaces_an_export(make, tmp_path, target):
    checkpoint, _ = make()
    out, _ = export(checkpoint, target, img_size=48, out=tmp_path / f'a/b/student{TARGETS[target].suffix}')
    first = bytes_of(out.parent)
    assert export(checkpoint, target, out=out, force=True)[0] == out
    second = bytes_of(out.parent)
    assert set(first) == set(second) and all(second[name] != first[name] for name in first)
    assert export(checkpoint, target, out=out, img_size=48, force=True)
    assert bytes_of(out.parent) == first


@pytest.mark.parametrize('target, out, message', [
    ('mmpretrain', 'epoch_2.pth', 'is the checkpoint itself, which is never replaced'),
    ('huggingface', 'folder', r'folder holds more than an export \(thesis.tex\), and is not replaced'),
    ('huggingface', 'file', 'file is a file, and the export is none'),
    ('timm', 'folder.safetensors', 'folder.safetensors is a folder, and the export is none'),
])
def test_export__force_has_limits(make, tmp_path, target, out, message):
    checkpoint, _ = make()
    for name in ('folder/thesis.tex', 'folder/config.json', 'folder.safetensors/x', 'file'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'old')
    before = bytes_of(tmp_path)
    with pytest.raises(FileExistsError, match=message):
        export(checkpoint, target, out=tmp_path / out, force=True)
    assert bytes_of(tmp_path) == before


def test_export__another_ending_is_refused(make, tmp_path):
    checkpoint, _ = make()
    with pytest.raises(ValueError, match='an export to onnx is a .onnx file, got --out .*student.pt2'):
        export(checkpoint, 'onnx', out=tmp_path / 'student.pt2')


def test_export__a_crash_leaves_no_half_file_and_the_old_one(make, tmp_path, monkeypatch):
    def write(student, path):
        path.write_bytes(b'half')
        raise OSError('disk full')

    checkpoint, _ = make()
    out, _ = export(checkpoint, 'timm', out=tmp_path / 'student.safetensors')
    before = bytes_of(tmp_path)
    monkeypatch.setitem(TARGETS, 'full', Target('.safetensors', write))
    for force, path in ((True, out), (False, tmp_path / 'new.safetensors')):
        with pytest.raises(OSError, match='disk full'):
            export(checkpoint, 'full', out=path, force=force)
    assert bytes_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['epoch_2.pth', 'student.safetensors',
                                                               'student.safetensors.json']


def test_export__a_link_to_nowhere_is_there_too(make, tmp_path):
    checkpoint, _ = make()
    out = tmp_path / 'student.pth'
    out.symlink_to(tmp_path / 'nowhere')
    with pytest.raises(FileExistsError, match='student.pth exists already'):
        export(checkpoint, 'mmpretrain', out=out)
    assert out.is_symlink()


@pytest.mark.parametrize('preprocessor, channels', [
    (PREPROCESSOR, 'in 0-255, RGB'),
    ({**PREPROCESSOR, 'bgr_to_rgb': False}, 'in 0-255, BGR, unless the pipeline loaded RGB'),
])
def test_export__manifest_tells_the_order_of_channels(make, tmp_path, preprocessor, channels):
    checkpoint, _ = make(preprocessor=preprocessor)
    _, manifest = export(checkpoint, 'mmpretrain', out=tmp_path / 'student.pth')
    assert manifest['normalisation']['images'] == channels
