from collections import namedtuple
from pathlib import Path

import pytest

from mmhdistill.analysis import doctor
from mmhdistill.analysis.conflicts import Environment
from mmhdistill.analysis.doctor import (
    Finding,
    Report,
    Trial,
    as_text,
    describe_run,
    examine,
    folder_findings,
    gpu_findings,
    missing_data,
    package_findings,
    run_findings,
)
from tests.helpers import write_images

ROOT = Path(__file__).parents[2]
H100 = dict(name='H100', capability=[9, 0], memory=80 * 2**30, error=None)
NO_KERNELS = 'CUDA error: no kernel image is available for execution on the device'
# Four GPUs: one that works, one without kernels, one that is full, one that is not to be had.
FAKE_TORCH = f'''
from types import SimpleNamespace as Some

ADVICE = "\\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\\n"


class Number:
    __mul__ = sum = lambda self, *args: self
    item = lambda self: 4.0


def ones(number, device):
    if device == 1:
        raise RuntimeError("{NO_KERNELS}" + ADVICE)
    if device == 2:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 MiB.")
    return Number()


def properties(i):
    if i == 3:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable" + ADVICE)
    return Some(name="A100", major=8, minor=0, total_memory=2**30)


version = Some(cuda="12.8", hip=None)
distributed = Some(is_available=lambda: True, is_nccl_available=lambda: True)
cuda = Some(device_count=lambda: 4, get_device_properties=properties, get_arch_list=lambda: ["sm_80"],
            nccl=Some(version=lambda: (2, 26, 2)))
'''


@pytest.mark.parametrize('code, error', [
    ('raise ImportError("no such thing")', 'ImportError: no such thing'),
    ('import os, signal; os.kill(os.getpid(), signal.SIGSEGV)', 'the process was killed by SIGSEGV'),
    ('import sys; sys.exit(3)', 'exit code 3'),
])
def test_try__what_breaks_is_told(code, error):
    trial = doctor._try(code)
    assert (trial.output, trial.error) == (None, error)


def test_try__what_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, '_TIMEOUT', 1)
    assert doctor._try('import time; time.sleep(60)').error == 'took more than 1 s'


def test_try__last_object_of_the_output():
    trial = doctor._try('import sys; print("{1}"); print("{\\"a\\": %s}" % sys.argv[1]); print("bye")', '5')
    assert (trial.output, trial.error) == (dict(a=5), None)


@pytest.fixture
def seen(monkeypatch):
    """Conflicts that are found, given as cured or not."""

    def set_to(*cured):
        conflicts = [(doctor.Finding(f'package{i}', f'what {i}', f'cure {i}', note), note)
                     for i, note in enumerate(cured)]
        Conflict = namedtuple('Conflict', 'name cure cured')
        monkeypatch.setattr(doctor, 'find_conflicts', lambda environment: [
            (Conflict(finding.name, finding.cure, note), finding.what) for finding, note in conflicts])
        return [finding for finding, _ in conflicts]

    return set_to


def test_package_findings__what_cannot_be_imported(seen):
    assert package_findings(Environment({})) == seen()
    environment = Environment({'mmdet': 'ImportError: x', 'package0': 'RuntimeError: y'})
    broken, = package_findings(Environment({'mmdet': 'ImportError: x'}))
    assert (broken.name, broken.what, broken.note) == ('mmdet', 'importing mmdet fails: ImportError: x.', False)
    # A conflict that is known explains what cannot be imported; one that is cured explains its own package.
    known = seen(False)
    assert package_findings(environment) == known
    note, = seen(True)
    assert package_findings(environment) == [note, broken]


def cards(**kwargs):
    return {**dict(built='12.8', architectures=['sm_80', 'sm_90', 'compute_90'], nccl='2.26.2', devices=[H100, H100]),
            **kwargs}


def test_gpu_findings__all_is_well():
    rows, found = gpu_findings(cards(), None, ['GPU 0: H100', 'GPU 1: H100'])
    assert found == []
    assert rows == [('torch', 'built for CUDA 12.8'), ('GPU 0', 'H100, 80.0 GiB, compute capability 9.0'),
                    ('GPU 1', 'H100, 80.0 GiB, compute capability 9.0'), ('NCCL', '2.26.2')]
    rows, found = gpu_findings(cards(built=None, nccl=None, devices=[], architectures=[]), None, [])
    assert found == []
    assert rows == [('torch', 'built for the CPU'), ('GPUs', 'none that torch sees'), ('NCCL', 'not built in')]


@pytest.mark.parametrize('change, name, what, cure', [
    (dict(built=None, devices=[], nccl=None), 'GPU',
     'the driver lists 2 GPUs, and torch sees none: it is built for the CPU.', 'Install torch and torchvision built'),
    (dict(devices=[]), 'GPU', 'the driver lists 2 GPUs, and torch sees none: it is built for CUDA 12.8.',
     'Update the driver'),
    (dict(devices=[H100, dict(H100, name='GTX', capability=[6, 1])]), 'GPU',
     'torch has no kernels for GPU 1, GTX of compute capability 6.1: it is built for sm_80, sm_90, compute_90.',
     'Install a torch that is built for it'),
    (dict(devices=[dict(H100, error=NO_KERNELS)]), 'GPU', 'torch has no kernels for GPU 0, H100 of compute capability '
     '9.0: it is built for sm_80, sm_90, compute_90.', 'Install a'),
    (dict(nccl=None), 'NCCL', '2 GPUs, and torch is built without NCCL', 'Install torch from pip'),
])
def test_gpu_findings__one(change, name, what, cure):
    _, (found, ) = gpu_findings(cards(**change), None, ['GPU 0: H100', 'GPU 1: H100'])
    assert (found.name, found.note) == (name, False)
    assert found.what.startswith(what) and found.cure.startswith(cure)


def test_gpu_findings__each_is_tried_on_its_own(tmp_path, monkeypatch):
    (tmp_path / 'torch.py').write_text(FAKE_TORCH)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    trial = doctor._try(doctor._GPUS)
    assert trial.error is None
    rows, found = gpu_findings(trial.output, None, [])
    a100 = 'A100, 1.0 GiB, compute capability 8.0'
    busy = 'CUDA error: CUDA-capable device(s) is/are busy or unavailable'
    assert rows[1:-1] == [('GPU 0', a100), ('GPU 1', a100), ('GPU 2', a100), ('GPU 3', busy)]
    assert [finding.what for finding in found] == [
        'torch has no kernels for GPU 1, A100 of compute capability 8.0: it is built for sm_80.',
        'torch cannot compute on GPU 2, A100 of compute capability 8.0: CUDA out of memory. Tried to allocate 2 MiB.',
        f'torch cannot compute on GPU 3: {busy}.']


@pytest.mark.parametrize('broken, name, what', [
    ([doctor._GPUS], 'GPU', 'asking torch for GPUs fails: killed.'),
    # One finding, not two.
    ([doctor._GPUS, 'import torch'], 'torch', 'importing torch fails: killed.'),
])
def test_examine__torch_is_one_thing_and_its_gpus_another(broken, name, what, seen, monkeypatch, tmp_path):
    seen()
    monkeypatch.setattr(doctor, '_TRIALS', {'torch': 'import torch', 'mmhdistill': 'pass'})
    monkeypatch.setattr(doctor, '_listed_gpus', list)
    monkeypatch.setattr(doctor, '_try', lambda code: Trial(1.0, error='killed' if code in broken else None))
    report = examine(work_dir=str(tmp_path))
    found, = report.findings
    assert (found.name, found.what) == (name, what)
    assert report.facts['GPUs'] == [('torch', 'cannot be asked: killed')]


@pytest.mark.parametrize('capability, architectures, has', [
    ([8, 6], ['sm_80'], True), ([8, 0], ['sm_86'], False), ([9, 0], ['sm_80'], False),
    ([12, 0], ['sm_80', 'compute_90'], True), ([8, 9], ['sm_90', 'compute_90'], False), ([9, 0], ['sm_90a'], True),
    # Of AMD, which counts otherwise.
    ([9, 4], ['gfx942'], True),
])
def test_has_kernels(capability, architectures, has):
    assert doctor._has_kernels(capability, architectures) is has


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free on every disk."""

    def set_to(value):
        monkeypatch.setattr(doctor, 'disk_usage', lambda path: namedtuple('Usage', 'free')(value))

    return set_to


def test_folder_findings__disk_shared_by_two_folders(tmp_path, free):
    free(10 * 2**30)
    folders = {'work dir': (tmp_path / 'a/b', 6 * 2**30), 'cache of weights': (tmp_path, 4 * 2**30)}
    rows, found = folder_findings(folders)
    assert found == []
    assert rows == [('work dir', f'{tmp_path}/a/b, 10.00 GiB free, 6.00 GiB needed'),
                    ('cache of weights', f'{tmp_path}, 10.00 GiB free, 4.00 GiB needed')]
    # Looking leaves nothing behind.
    assert list(tmp_path.iterdir()) == []
    free(10 * 2**30 - 1)
    _, (found, ) = folder_findings(folders)
    assert (found.name, found.what) == (
        'disk', f'10.00 GiB will be written to work dir {tmp_path}/a/b and cache of weights {tmp_path}, and 10.00 GiB '
        'are free.')


def test_folder_findings__no_access(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(doctor.tempfile, 'TemporaryFile', refuse)
    _, (found, ) = folder_findings({'work dir': (tmp_path / 'work_dirs/x', 0)})
    assert (found.name, found.what, found.cure) == (
        'work dir', f'{tmp_path} cannot be written to: Read-only file system.', 'Give another --work-dir.')


def test_folder_findings__where_not_even_root_can_write():
    _, (found, ) = folder_findings({'cache of weights': (Path('/proc/none/x'), 0)})
    assert found.what.startswith('/proc cannot be written to: ')
    assert found.cure == 'Set MMHDISTILL_CACHE to another folder.'


def needs(**kwargs):
    return Trial(1.0, {**dict(work_dir='work_dirs/x', checkpoint=100, checkpoints=4, logs=7, fetch=0, cache='/cache'),
                       **kwargs})


def test_run_findings__bytes(tmp_path):
    _, folders, found = run_findings('x.py', needs(), None)
    assert (folders, found) == ({'work dir': (Path('work_dirs/x'), 407)}, [])
    # What an earlier part of the run has left is there already.
    for index in range(3):
        (tmp_path / f'epoch_{index}.pth').write_bytes(b'0' * 90)
    assert run_findings('x.py', needs(), str(tmp_path))[1] == {'work dir': (tmp_path, 137)}
    assert run_findings('x.py', needs(checkpoints=None), str(tmp_path))[1] == {'work dir': (tmp_path, 107)}
    assert run_findings('x.py', needs(fetch=11), None)[1]['cache of weights'] == (Path('/cache'), 11)


def test_run_findings__what_is_wrong():
    rows, folders, (found, ) = run_findings('x.py', needs(wrong='no key', unknown='its settings are wrong'), 'out')
    assert rows == [('disk', 'not known: its settings are wrong')]
    assert (folders, found) == ({'work dir': (Path('out'), 0)}, Finding('config', 'no key', 'Correct the spelling.'))
    _, _, (found, ) = run_findings('x.py', needs(doubts=['odd key']), None)
    assert (found.name, found.what, found.note) == ('config', 'odd key', True)
    _, _, (gone, absent) = run_findings('x.py', needs(missing={'a.data_root': 'photos'}, absent='no image'), None)
    assert gone == Finding('a.data_root', "'photos' is not there.",
                           'Put it there, or name another: --cfg-options a.data_root=PATH')
    assert (absent.what, absent.note) == ('no image', False)
    rows, _, (found, ) = run_findings('x.py', Trial(1.0, error='FileNotFoundError: x'), None)
    assert rows == [('config', 'FileNotFoundError: x')]
    assert found.what == 'x.py cannot be looked at: FileNotFoundError: x.'


def test_describe_run__is_what_the_plan_says():
    config = str(ROOT / 'configs/quickstart/hdistill_vit-photos.py')
    options = ['train_cfg.max_epochs=8', 'default_hooks.checkpoint.interval=1',
               'default_hooks.checkpoint.max_keep_ckpts=2', 'model.teachers.mae.checkpoint=/mae.pth',
               'optim_wrapper.paramwise_cfg.norm_decay_mlt=0']
    found = describe_run(config, options, 1)
    assert found['work_dir'] == 'work_dirs/hdistill_vit-photos'
    assert (found['checkpoints'], found['fetch']) == (3, 0)
    assert 1e6 < found['checkpoint'] < 1e7
    doubt, = found['doubts']
    assert "no 'norm_decay_mlt' is known: did you mean 'norm_decay_mult'?" in doubt
    wrong = describe_run(config, ['model.masker.keep_rat=1'], 1)
    assert "did you mean 'keep_rate'" in wrong['wrong'] and wrong['unknown'] == 'its settings are wrong'


def test_describe_run__what_is_no_distiller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = describe_run(str(ROOT / 'configs/quickstart/mae_vit-photos.py'), None, None)
    assert 'only a distiller' in found['unknown'] and 'wrong' not in found
    assert found['missing'] == {'train_dataloader.dataset.data_root': 'quickstart/data/train'}


def test_describe_run__data_and_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, weights = 'train_dataloader.dataset.data_root', 'model.teachers.moco.checkpoint'
    config = str(ROOT / 'configs/quickstart/moma_moco-to-mae_vit-photos.py')
    assert describe_run(config, None, 1)['missing'] == {
        data: 'quickstart/data/train', weights: 'quickstart/moco/epoch_8.pth',
        'model.backbone.init_from.checkpoint': 'quickstart/mae/epoch_12.pth'}
    (tmp_path / 'moco.pth').touch()
    options = [f'{data}=images', f'{weights}=moco.pth', 'model.backbone.init_from.checkpoint=None']
    (tmp_path / 'images').mkdir()
    found = describe_run(config, options, 1)
    assert found['missing'] == {} and found['absent'].startswith("no image found in sub-folders")
    write_images(tmp_path / 'images', [f'a/{index}.png' for index in range(64)])
    found = describe_run(config, options, 1)
    assert found['missing'] == {} and 'unknown' not in found


@pytest.mark.parametrize('dataset, missing', [
    (dict(data_root='here'), {}),
    (dict(data_root='no'), {'data_root': 'no'}),
    (dict(data_root='here', data_prefix='train', ann_file='names.txt'), {}),
    (dict(data_root='here', data_prefix='val'), {'data_prefix': 'here/val'}),
    (dict(data_root='here/', data_prefix=dict(img='val/'), ann_file='no.txt'),
     {'data_prefix.img': 'here/val/', 'ann_file': 'here/no.txt'}),
    (dict(data_root='no', data_prefix=dict(img='val'), ann_file='no.txt'), {'data_root': 'no'}),
    (dict(ann_file='no.txt'), {'ann_file': 'no.txt'}),
    (dict(type='RepeatDataset', dataset=dict(data_root='no')), {'dataset.data_root': 'no'}),
    (dict(type='ConcatDataset', datasets=[dict(data_root='here'), dict(data_root='no')]),
     {'datasets.1.data_root': 'no'}),
    # Not to be known from here.
    (dict(), {}),
    (dict(data_root='s3://bucket', data_prefix='train'), {}),
    (dict(data_root='no', data_prefix='s3://bucket'), {'data_root': 'no'}),
    (dict(data_root='no', backend_args=dict(backend='petrel')), {}),
    (dict(type='mmpretrain.CIFAR100', data_root='no'), {}),
])
def test_missing_data(dataset, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here/train').mkdir(parents=True)
    (tmp_path / 'here/names.txt').touch()
    assert missing_data(dataset, 'key') == {f'key.{name}': path for name, path in missing.items()}


def test_as_text():
    report = Report({'Versions': [('torch', '2.13.0'), ('torchvision', '0.28.0')]})
    assert as_text(report).splitlines() == [
        'Versions', '  torch        2.13.0', '  torchvision  0.28.0', '', 'Nothing is in the way of a run.']
    report.findings = [Finding('torchvision', 'is old.', 'none', note=True)]
    assert as_text(report).splitlines()[4:] == [
        'note   torchvision: is old.', 'cure   none', 'Nothing is in the way of a run.']
    assert report.problems == []
    report.findings.append(Finding('config', 'first\nsecond', 'Mend it.'))
    assert as_text(report).splitlines()[6:] == [
        'FOUND  config: first', '       second', 'cure   Mend it.', '1 thing has to be cured; run this again then.']
