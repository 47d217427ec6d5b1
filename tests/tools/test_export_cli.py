"""tools/export.py, on the checkpoint of a real run."""
import hashlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mmhdistill
from mmhdistill.registry import MODELS
from tests.export.conftest import manifest_of, native_features, student_features
from tests.helpers import IMAGENET, random_images, randomise, tiny_student

ROOT = Path(__file__).parents[2]
SUFFIXES = dict(mmpretrain='.pth', timm='.safetensors', huggingface='', torch='.pt2', onnx='.onnx')


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool and returns what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, args)])
        runpy.run_path(str(ROOT / 'tools/export.py'), run_name='__main__')
        return capsys.readouterr().out

    return run


@pytest.fixture
def trained(config):
    """Two epochs of the quick start's distiller."""
    subprocess.run([sys.executable, ROOT / 'tools/train.py', config], cwd=config.parent, check=True,
                   capture_output=True)
    return config.parent / 'work_dirs/tiny/epoch_2.pth'


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_export__from_a_run_to_every_library(config, trained, tool):
    cfg = Config.fromfile(config)
    student = MODELS.build(cfg.model.backbone)
    state = torch.load(trained, weights_only=True)['state_dict']
    student.load_state_dict({name.removeprefix('backbone.'): x for name, x in state.items()
                             if name.startswith('backbone.')}, strict=True)
    student.eval()
    side = cfg.model.backbone.img_size
    teachers = {name: dict(model=teacher.card.name, sha256=sha256(config.parent / f'data/{teacher.card.name}.pth'),
                           licence='', role='teacher') for name, teacher in cfg.model.teachers.items()}
    for target, suffix in SUFFIXES.items():
        for size in (side, side + 2 * cfg.model.backbone.patch_size):
            options, name = (('--img-size', size), f'_{size}px') if size != side else ((), '')
            out = trained.with_name(f'epoch_2{name}_{target}{suffix}')
            printed = tool(trained, '--to', target, *options)
            assert f'{out} for {target}, images of {size}x{size} px; {out}.json says where' in printed
            images = random_images(3, size)
            assert (native_features(target, out, images) - student_features(student, images)).abs().max() < 1e-5
            told = re.search(r"differ from the student's by at most (\S+) \(3 images", printed)
            assert bool(told) == (target in ('torch', 'onnx'))
            assert told is None or 0 <= float(told[1]) < 1e-5
            manifest = manifest_of(out)
            files = manifest.pop('files')
            assert files == {file.name: sha256(file) for file in (sorted(out.iterdir()) if out.is_dir() else [out])}
            assert {key: manifest[key] for key in ('method', 'epochs', 'iterations', 'target', 'image_size',
                                                   'mmhdistill', 'checkpoint', 'teachers', 'normalisation')} == dict(
                method='tiny', epochs=2, iterations=8, target=target, image_size=[size, size],
                mmhdistill=mmhdistill.__version__, checkpoint=dict(file='epoch_2.pth', sha256=sha256(trained)),
                teachers=teachers, normalisation=dict(mean=list(cfg.model.data_preprocessor.mean),
                                                      std=list(cfg.model.data_preprocessor.std),
                                                      images='in 0-255, RGB'))


@pytest.fixture
def files(tmp_path):
    """A student without a Runner's meta, a teacher and a detector."""
    cfg = Config.fromfile(ROOT / 'configs/quickstart/hdistill_vit-photos.py')
    state = {f'backbone.{name}': x for name, x in MODELS.build(cfg.model.backbone).state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'student.pth')
    torch.save(dict(state_dict={**state, 'rpn_head.conv.weight': torch.ones(1)}), tmp_path / 'detector.pth')
    import timm
    torch.save(timm.create_model('vit_tiny_patch16_224', depth=1).state_dict(), tmp_path / 'teacher.pth')
    (tmp_path / 'text.pth').write_text('no weights')
    return tmp_path


CONFIG = ('--config', 'mmhdistill::quickstart/hdistill_vit-photos.py')


def test_export__config_by_package_name_out_and_force(files, tool):
    out = files / 'new/student.safetensors'
    for force in ((), ('--force', )):
        assert f'{out} for timm' in tool(files / 'student.pth', '--to', 'timm', *CONFIG, '--out', out, *force)
    assert json.loads((files / 'new/student.safetensors.json').read_text())['method'] == 'hdistill_vit-photos'
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(SystemExit) as caught:
        tool(files / 'student.pth', '--to', 'timm', *CONFIG, '--out', out, '--img-size', 32)
    assert caught.value.code == f'export.py: {out} exists already: give another --out, or --force to replace it.'
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before


@pytest.mark.parametrize('args, message', [
    (('student.pth', ), 'student.pth keeps no config, as checkpoints of a Runner do'),
    (('none.pth', *CONFIG), 'none.pth does not exist: give the path of an existing file.'),
    (('text.pth', *CONFIG), 'text.pth cannot be read: it is damaged'),
    (('teacher.pth', *CONFIG), 'teacher.pth holds a ViT in timm format, as teachers do, and not a student'),
    (('detector.pth', *CONFIG), 'detector.pth is the checkpoint of a detector or segmentor (it has rpn_head)'),
    (('student.pth', '--config', 'mmhdistill::hdistill/vit-b_clip-mae_300e.py'),
     'student.pth does not fit the backbone of mmhdistill::hdistill/vit-b_clip-mae_300e.py: 96 missing'),
    (('student.pth', '--config', 'none.py'), 'none.py'),
    (('student.pth', *CONFIG, '--img-size', '50'), 'images of 50x50 pixels cannot be cut into patches of'),
])
def test_export__refuses_in_one_sentence(files, tool, args, message):
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as caught:
        tool(files / args[0], '--to', 'mmpretrain', *args[1:])
    assert caught.value.code.startswith('export.py: ')
    assert message in caught.value.code
    assert sorted(files.iterdir()) == before


def test_export__commands_and_readers_of_the_docs(tmp_path, tool, monkeypatch):
    section = re.search(r'^## Export\n(.*?)(?=^## |\Z)', (ROOT / 'docs/transfer.md').read_text(), re.M | re.S)[1]
    commands = [shlex.split(line) for line in re.search(r'```bash\n(.*?)```', section, re.S)[1].splitlines()]
    monkeypatch.chdir(tmp_path)
    model = dict(backbone=tiny_student(img_size=224, patch_size=16),
                 data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **IMAGENET))
    student = randomise(MODELS.build(model['backbone']))
    student.eval()
    torch.save(dict(state_dict=student.state_dict(), meta=dict(cfg=Config(dict(model=model)).pretty_text)),
               'epoch_300.pth')
    done = [tool(*command[2:]) for command in commands if command[:2] == ['python', 'tools/export.py']]
    assert len(done) == len(SUFFIXES) and [command[0] for command in commands].count('python') == len(done)
    scope = {}
    with torch.no_grad():
        exec(re.search(r'```python\n(.*?)```', section, re.S)[1], scope)
    expected = student_features(student, scope['images'])
    for library in ('timm', 'hf', 'torch'):
        assert (scope[f'{library}_features'] - expected).abs().max() < 1e-5
    assert scope['onnx_features'].shape == (2, 1 + 24**2, 32)
