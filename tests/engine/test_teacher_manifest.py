import hashlib
import json
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from torch.utils.data import Dataset

import mmhdistill.engine  # noqa: F401
from mmhdistill.models import ViTTeacher
from tests.helpers import tiny_card, tiny_distiller, tiny_student, tiny_teacher

HOOK = dict(type='mmhdistill.TeacherManifest')


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


def make_runner(folder, model, epochs=1, **kwargs):
    return Runner(
        model=model,
        work_dir=str(folder / 'work'),
        train_dataloader=dict(
            batch_size=2, dataset=Images(), sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        custom_hooks=[HOOK],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        default_scope='mmpretrain',
        log_level='WARNING',
        experiment_name=f'{folder.name}-{len(list(folder.iterdir()))}',
        **kwargs)


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


def test_before_train__a_resumed_run_records_its_own_files(tmp_path, weights):
    make_runner(tmp_path, distiller(weights)).train()
    # The same weights in another file.
    other = tmp_path / 'other.pth'
    torch.save(dict(model=torch.load(weights, weights_only=True)), other)
    runner = make_runner(tmp_path, distiller(other), epochs=2, resume=True)
    runner.train()
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    assert digest != hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(Path(runner.log_dir, 'teachers.json').read_text())['mae']['sha256'] == digest
    checkpoint = torch.load(tmp_path / 'work/epoch_2.pth', weights_only=True)
    assert (checkpoint['teachers']['mae']['sha256'], checkpoint['meta']['epoch']) == (digest, 2)


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
