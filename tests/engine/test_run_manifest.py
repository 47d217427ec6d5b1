import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

import mmhdistill.engine  # noqa: F401
from mmhdistill import __version__
from mmhdistill.engine import RunManifest
from mmhdistill.models import ViTTeacher
from tests.helpers import spawn, tiny_card, tiny_distiller, tiny_student, tiny_teacher

HOOK = dict(type='mmhdistill.RunManifest')


class Images(Dataset):

    def __len__(self):
        return 2

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(ViTTeacher(tiny_card(), checkpoint=None).vit.state_dict(), path)
    return path


def distiller(weights):
    """One teacher of a file, one of random weights."""
    loaded = dict(type='mmhdistill.ViTTeacher', card=tiny_card(licence='MIT'), checkpoint=str(weights))
    return tiny_distiller(teachers=dict(clip=tiny_teacher(), mae=loaded))


def make_runner(folder, model, epochs=1, hook=HOOK, **kwargs):
    return Runner(
        model=model,
        work_dir=str(folder / 'work'),
        train_dataloader=dict(
            batch_size=2, dataset=Images(), sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        custom_hooks=[dict(hook)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        default_scope='mmpretrain',
        log_level='WARNING',
        experiment_name=f'{folder.name}-{len(list(folder.iterdir()))}',
        **kwargs)


def train(folder, cfg, **kwargs):
    runner = make_runner(folder, cfg.model.to_dict(), cfg=cfg, **kwargs)
    runner.train()
    return runner


def test_before_train__file_and_checkpoint_name_the_loaded_teachers(tmp_path, weights):
    runner = make_runner(tmp_path, distiller(weights))
    runner.train()
    text = Path(runner.log_dir, 'teachers.json').read_text()
    assert text.endswith('}\n')
    manifest = json.loads(text)
    assert list(manifest) == ['clip', 'mae']
    assert (manifest['clip']['source'], manifest['clip']['matched'], manifest['clip']['sha256']) == \
        ('random weights', 0, None)
    receipt = manifest['mae']
    assert receipt['sha256'] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (receipt['source'], receipt['licence'], receipt['model']) == (str(weights), 'MIT', 'tiny')
    assert receipt['run']['grid'] == [4, 4]
    assert 0 < receipt['run']['share'] < 1
    # No further globals are allowed than those of a Runner's own checkpoint.
    checkpoint = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=True)
    assert checkpoint['teachers'] == manifest
    assert [name for name in checkpoint['state_dict'] if 'teacher' in name] == []


def test_after_load_checkpoint__other_teachers_are_refused_or_allowed_by_name(tmp_path, weights):
    make_runner(tmp_path, distiller(weights)).train()
    # The same weights in another file.
    other = tmp_path / 'other.pth'
    torch.save(dict(model=torch.load(weights, weights_only=True)), other)
    old, new = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (weights, other))
    message = (r"of a run with other teachers \(before -> now\):\nteachers\n"
               rf"  teacher mae.sha256: '{old}' -> '{new}'\nResume with .*--allow-changed teachers;")
    with pytest.raises(ValueError, match=message):
        make_runner(tmp_path, distiller(other), epochs=2, resume=True).train()
    runner = make_runner(tmp_path, distiller(other), epochs=2, resume=True, hook=dict(HOOK, allow_changed=['teachers']))
    runner.train()
    assert json.loads(Path(runner.log_dir, 'teachers.json').read_text())['mae']['sha256'] == new
    checkpoint = torch.load(tmp_path / 'work/epoch_2.pth', weights_only=True)
    assert (checkpoint['teachers']['mae']['sha256'], checkpoint['meta']['epoch']) == (new, 2)


def test_after_load_checkpoint__the_same_teachers_elsewhere(tmp_path, weights):
    make_runner(tmp_path, distiller(weights)).train()
    moved = weights.rename(tmp_path / 'moved.pth')
    runner = make_runner(tmp_path, distiller(moved), epochs=2, resume=True)
    runner.train()
    assert runner.epoch == 2


@pytest.mark.parametrize('part, change, line', [
    ('student', dict(backbone=dict(drop_path_rate=0.1)), "model.backbone.drop_path_rate: absent -> 0.1"),
    ('student', dict(data_preprocessor=dict(std=[1, 2, 3])),
     'model.data_preprocessor.std: [58.395, 57.12, 57.375] -> [1, 2, 3]'),
    ('losses', dict(losses=dict(feature=dict(loss_weight=2.0))), 'model.losses.feature.loss_weight: absent -> 2.0'),
    ('losses', dict(losses=dict(again=dict(type='mmhdistill.TokenRelationLoss', teacher='clip'))),
     "model.losses.again.teacher: absent -> 'clip'"),
    ('teachers', dict(teachers=dict(mae=dict(card=dict(mean=[1.0, 2.0, 3.0])))),
     'teacher mae.mean: [123.675, 116.28, 103.53] -> [1.0, 2.0, 3.0]'),
])
def test_after_load_checkpoint__what_is_refused(part, change, line, tmp_path):
    train(tmp_path, Config(dict(model=tiny_distiller())))
    cfg = Config(dict(model=tiny_distiller()))
    cfg.merge_from_dict(dict(model=change))
    with pytest.raises(ValueError, match=f'of a run with other {part} ') as error:
        train(tmp_path, cfg, resume=True)
    assert f'\n  {line}\n' in str(error.value)
    assert f'--allow-changed {part};' in str(error.value)
    assert train(tmp_path, cfg, resume=True, hook=dict(HOOK, allow_changed=[part])).epoch == 1


def test_after_load_checkpoint__other_changes_are_told(tmp_path, monkeypatch):
    train(tmp_path, Config(dict(model=tiny_distiller(), work_dir='a', optim_wrapper=dict(optimizer=dict(lr=1)))))
    cfg = Config(dict(model=tiny_distiller(), work_dir='b', optim_wrapper=dict(optimizer=dict(lr=2))))
    cfg.model.masker.keep_rate = 0.5
    monkeypatch.setattr('mmhdistill.engine.manifest._PACKAGES', ())
    runner, messages = make_runner(tmp_path, cfg.model.to_dict(), epochs=1, resume=True, cfg=cfg), []
    monkeypatch.setattr(runner.logger, 'warning', messages.append)
    runner.train()
    told, = (message for message in messages if message.startswith('the resumed run differs from its checkpoint'))
    lines = told.splitlines()[1:]
    assert lines[:2] == ['  model.masker.keep_rate: 0.8 -> 0.5', '  optim_wrapper.optimizer.lr: 1 -> 2']
    assert all(line.startswith('  versions ') and line.endswith(' -> absent') for line in lines[2:]) and len(lines) > 4


def test_before_train__manifest_of_the_run_and_in_its_checkpoints(tmp_path, weights):
    cfg = Config(dict(model=distiller(weights), train_dataloader=dict(batch_size=2, shuffle=None)))
    runner = train(tmp_path, cfg)
    manifest = json.loads((tmp_path / 'work/manifest.json').read_text())
    assert manifest == json.loads(Path(runner.log_dir, 'manifest.json').read_text())
    assert manifest == torch.load(tmp_path / 'work/epoch_1.pth', weights_only=True)['manifest']
    assert list(manifest) == ['config', 'versions', 'git', 'teachers', 'data', 'seeds', 'command']
    assert manifest['config']['model']['losses'] == tiny_distiller()['losses']
    assert manifest['config']['train_dataloader'] == dict(batch_size=2, shuffle=None)
    assert manifest['versions']['mmhdistill'] == __version__ and 'torch' in manifest['versions']
    # By its own name, or as the maintained fork.
    assert len({'mmengine', 'onedl-mmengine'} & set(manifest['versions'])) == 1
    assert manifest['teachers'] == runner.model.manifest
    assert manifest['data'] == dict(type='Images', count=2, names=None)
    assert manifest['seeds'] == dict(seed=runner.seed, diff_rank_seed=False, processes=1)


def test_run_manifest__former_name():
    assert isinstance(HOOKS.build(dict(type='mmhdistill.TeacherManifest')), RunManifest)


def test_run_manifest__unknown_name():
    with pytest.raises(ValueError, match='allow_changed has masker: it takes student, teachers, losses'):
        RunManifest(allow_changed=['masker', 'student'])


def test_before_train__nothing_is_written_without_teachers(tmp_path):
    model = dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='mmpretrain.VisionTransformer', out_type='cls_token', img_size=32, patch_size=8,
                      arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16)),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=2, in_channels=16, topk=1))
    runner = make_runner(tmp_path, model)
    runner.call_hook('before_train')
    runner.save_checkpoint(str(tmp_path), 'c.pth', save_optimizer=False, save_param_scheduler=False)
    assert list(tmp_path.rglob('teachers.json')) == []
    assert 'teachers' not in torch.load(tmp_path / 'c.pth', weights_only=True)


def test_before_train__what_the_student_started_from_is_on_record(tmp_path, weights):
    card = tiny_card(name='start', mlp_ratio=2.0, licence='CC-BY-NC-4.0')
    start = ViTTeacher(card, checkpoint=None).vit.state_dict()
    torch.save(start, tmp_path / 'start.pth')
    model = distiller(weights)
    model['backbone'] = tiny_student(init_from=dict(card=card, checkpoint=str(tmp_path / 'start.pth')))
    runner = make_runner(tmp_path, model)
    runner.train()
    manifest = json.loads(Path(runner.log_dir, 'teachers.json').read_text())
    assert list(manifest) == ['clip', 'mae', 'backbone']
    assert [receipt['role'] for receipt in manifest.values()] == ['teacher', 'teacher', 'student']
    receipt = manifest['backbone']
    digest = hashlib.sha256((tmp_path / 'start.pth').read_bytes()).hexdigest()
    assert (receipt['name'], receipt['model'], receipt['source'], receipt['sha256'], receipt['licence']) == \
        ('backbone', 'start', str(tmp_path / 'start.pth'), digest, 'CC-BY-NC-4.0')
    assert (receipt['matched'], receipt['total']) == (len(start), len(start))
    assert torch.load(tmp_path / 'work/epoch_1.pth', weights_only=True)['teachers'] == manifest


def test_before_train__a_classifier_keeps_the_receipts_of_its_students_teachers(tmp_path, weights):
    make_runner(tmp_path, distiller(weights)).train()
    path = tmp_path / 'work/epoch_1.pth'
    backbone = dict(tiny_student(), type='mmpretrain.VisionTransformer', out_type='cls_token',
                    init_cfg=dict(type='Pretrained', checkpoint=f'mmhdistill:{path}'))
    runner = make_runner(tmp_path, dict(
        type='mmpretrain.ImageClassifier', backbone=backbone,
        head=dict(type='mmpretrain.LinearClsHead', num_classes=2, in_channels=32, topk=1)))
    runner.model.init_weights()
    runner.call_hook('before_train')
    runner.save_checkpoint(str(tmp_path), 'c.pth', save_optimizer=False, save_param_scheduler=False)
    manifest = torch.load(path, weights_only=True)['teachers']
    assert list(manifest) == ['clip', 'mae'] and manifest['mae']['licence'] == 'MIT'
    assert torch.load(tmp_path / 'c.pth', weights_only=True)['teachers'] == manifest
    assert json.loads(Path(runner.log_dir, 'teachers.json').read_text()) == manifest


def test_before_save_checkpoint__model_in_a_wrapper(tmp_path, weights):
    from mmengine.model import is_model_wrapper
    from torch.nn.parallel import DataParallel
    runner = make_runner(tmp_path, distiller(weights))
    runner.model.init_weights()
    manifest = runner.model.manifest
    runner.model = DataParallel(runner.model)
    assert is_model_wrapper(runner.model)
    checkpoint = {}
    runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
    assert checkpoint['teachers'] == manifest
    assert list(manifest) == ['clip', 'mae']


class Files(Dataset):

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def get_data_info(self, index):
        return dict(img_path=f'/node/{self.names[index]}')


def check_data(rank, folder):
    """The process with the second half of the lists has other ones."""
    names = [f'class/{index}.jpg' for index in range(6)]
    same, fewer, other = (DataLoader(Files(x)) for x in (
        names, names[:len(names) - rank], names if rank == 0 else [*names[:5], 'class/7.jpg']))
    said = []
    for train, val, test in ((same, same, same), (fewer, same, same), (same, other, same), (same, same, other)):
        runner = SimpleNamespace(train_dataloader=train, val_dataloader=val, val_loop=object(), test_dataloader=test)
        hook = RunManifest()
        hook._write = lambda runner: said.append('written')
        try:
            hook.before_train(runner)
            hook.before_test(runner)
        except ValueError as error:
            said.append(str(error))
    (folder / f'{rank}.json').write_text(json.dumps(said))


@pytest.mark.slow
def test_before_train__all_processes_refuse_lists_that_differ(tmp_path):
    spawn(check_data, tmp_path, tmp_path)
    said = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1)]
    assert [text for text in said[0] if text != 'written'] == said[1]
    # The same lists; then other ones for training, validation, and testing, before which the manifest is written.
    assert [text == 'written' for text in said[0]] == [True, False, False, True, False]
    fewer, validation, test = said[1]
    said = 'the processes do not list the same'
    assert fewer.startswith(f'{said} training data: 6, 5 samples, process by process. Each')
    assert validation.startswith(f'{said} validation data: 6, 6 samples, process by process, of other names. Each')
    assert test.startswith(f'{said} test data: 6, 6 samples')
