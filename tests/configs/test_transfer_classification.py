"""Classification recipes: each starts from a student, learns where it should, and says what its name says."""
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mmpretrain
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.dist import broadcast_object_list
from mmengine.hooks import SyncBuffersHook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODEL_WRAPPERS, MODELS, DefaultScope
from mmengine.runner import Runner

import mmhdistill  # noqa: F401  (lets the package's name resolve in configs)
from mmhdistill.functional import knn_accuracy
from tests.helpers import build_distiller, random_images, snapshot, spawn, tiny_student, write_images

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'configs/transfer/classification'
CONFIGS = sorted(path.name for path in FOLDER.glob('*.py'))
FINETUNE = [name for name in CONFIGS if '_ft' in name]
LINEAR = [name for name in CONFIGS if '_linear' in name]
TRAINED = FINETUNE + LINEAR
NAME = r'vit-(b|l|tiny)_(ft|linear|knn)(?:-(\d+)e)?_(\w+)\.py'
CLASSES = dict(in1k=1000, cifar100=100, cars=196, inat19=1010, cifar10=10, caltech101=100)


@pytest.fixture(scope='module')
def distiller():
    return build_distiller()


@pytest.fixture(scope='module')
def checkpoint(distiller, tmp_path_factory):
    """The checkpoint of a distiller whose student has 4x4 patches of 8 px, width 32 and depth 3."""
    path = tmp_path_factory.mktemp('distiller') / 'epoch_1.pth'
    torch.save(dict(state_dict=distiller.state_dict()), path)
    return path


def tiny(name, checkpoint=None):
    """The config with the architecture of :func:`tiny_student`; the image size is its own, and drop path too."""
    cfg = Config.fromfile(FOLDER / name)
    student = tiny_student()
    cfg.merge_from_dict({
        'model.backbone.arch': dict(student['arch'], _delete_=True),
        'model.backbone.patch_size': 8,
    })
    cfg.model.backbone.img_size = 32
    if 'in_channels' in cfg.model.head:
        cfg.model.head.in_channels = 32
        cfg.model.backbone.init_cfg.checkpoint = f'mmhdistill:{checkpoint}'
        if checkpoint is None:
            cfg.model.backbone.init_cfg = None
    if '_linear' in name:
        cfg.model.neck[1].input_features = 32
        cfg.model.backbone.frozen_stages = 3
    if cfg.get('data_preprocessor'):
        cfg.model.data_preprocessor = cfg.data_preprocessor
    return cfg


def build(cfg, seed=0):
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    return model


def make_batch(cfg, folder, number=4, size=80):
    """What the config's own training pipeline makes of random images of the first classes."""
    np.random.seed(0)
    torch.manual_seed(0)
    paths = write_images(folder, [f'{index}.png' for index in range(number)], size=size)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        pipeline = Compose(cfg.train_dataloader.dataset.pipeline)
    if cfg.train_dataloader.dataset.type == 'CIFAR100':
        rng = np.random.default_rng(0)
        images = [dict(img=rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(number)]
    else:
        images = [dict(img_path=str(path)) for path in paths]
    return pseudo_collate([pipeline(dict(image, gt_label=index)) for index, image in enumerate(images)])


def test_configs__are_the_recipes():
    assert len(FINETUNE) == 7
    assert len(LINEAR) == 6
    assert len(CONFIGS) == 14


@pytest.mark.parametrize('name', TRAINED)
def test_config__every_tensor_of_the_student_is_loaded_and_none_else_is_in_the_backbone(name, distiller, checkpoint):
    model = build(tiny(name, checkpoint))
    student, backbone = distiller.backbone.state_dict(), model.backbone.state_dict()
    assert set(student) == set(backbone)
    assert [key for key, x in student.items() if not torch.equal(x, backbone[key])] == []
    # Beside it there is a classifier, and the statistics of a linear probe.
    others = {key.rpartition('.')[0] for key in model.state_dict() if not key.startswith('backbone.')}
    assert others == ({'head.fc', 'neck.1.bn'} if name in LINEAR else {'head.fc'})


@pytest.mark.parametrize('name', TRAINED)
def test_config__the_classifier_reads_what_k_nn_reads(name, distiller, checkpoint):
    model = build(tiny(name, checkpoint)).eval()
    images = random_images(3)
    with torch.no_grad():
        found = model.extract_feat(images)[-1]
    expected = torch.stack([sample.feature for sample in distiller.predict(images)])
    if name in LINEAR:
        # Batch norm of fresh statistics: mean 0 and variance 1, eps 1e-6.
        expected = expected / (1 + 1e-6)**0.5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.1


@pytest.mark.parametrize('name', FINETUNE)
def test_finetune__everything_learns_from_the_own_pipeline(name, checkpoint, tmp_path):
    cfg = tiny(name, checkpoint)
    model = build(cfg).train()
    data = model.data_preprocessor(make_batch(cfg, tmp_path), True)
    size = dict(in1k=224, cifar100=224, cars=224, inat19=224, cifar10=32, caltech101=64)[re.match(NAME, name)[4]]
    assert data['inputs'].shape == (4, 3, size, size)
    losses = model(**data, mode='loss')
    # The classifier starts at next to nothing: the loss is that of a uniform guess.
    assert losses['loss'].item() == pytest.approx(np.log(cfg.model.head.num_classes), rel=1e-3)
    losses['loss'].backward()
    dead = [key for key, p in model.named_parameters()
            if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().sum() > 0]
    # Drop path may pass over a block.
    assert {key.split('.')[1] for key in dead} <= {'layers'}
    assert len(dead) < len(list(model.parameters())) / 2
    if cfg.model.backbone.drop_path_rate == 0:
        assert dead == []


@pytest.mark.parametrize('name', FINETUNE)
def test_finetune__rates_fall_from_layer_to_layer(name):
    cfg = tiny(name)
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    lr, decay = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.paramwise_cfg.layer_decay_rate
    names = {id(p): key for key, p in model.named_parameters()}
    found = {names[id(p)]: group['lr'] for group in optimizer.param_groups for p in group['params']}
    assert set(found) == set(names.values())
    # L = 3 layers.
    layers = {'backbone.cls_token': 0, 'backbone.pos_embed': 0, 'backbone.patch_embed': 0, 'backbone.layers.0.': 1,
              'backbone.layers.1.': 2, 'backbone.layers.2.': 3, 'backbone.ln1.': 4, 'head.': 4}
    for key, rate in found.items():
        layer = next(layer for start, layer in layers.items() if key.startswith(start))
        assert rate == pytest.approx(lr * decay**(4 - layer), rel=1e-12), key


@pytest.mark.parametrize('name', LINEAR)
def test_linear__only_the_classifier_learns(name, checkpoint, tmp_path):
    cfg = tiny(name, checkpoint)
    model = build(cfg).train()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = snapshot(model)
    images = random_images(4)
    with torch.no_grad():
        features = [model.backbone(images)[-1], model.eval().backbone(images)[-1]]
    model.train()
    # The mode that is trained in computes what is tested.
    assert torch.equal(*features)
    losses = model.train_step(make_batch(cfg, tmp_path), wrapper)
    assert torch.isfinite(losses['loss'])
    assert torch.equal(model.backbone(images)[-1], features[0])
    after = snapshot(model)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {'head.fc.weight', 'head.fc.bias', 'neck.1.bn.running_mean', 'neck.1.bn.running_var',
                       'neck.1.bn.num_batches_tracked'}
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {'head.fc.weight', 'head.fc.bias'}


@pytest.mark.parametrize('name', LINEAR)
def test_linear__the_real_depth_is_frozen_and_images_are_cropped_and_flipped_alone(name):
    cfg = Config.fromfile(FOLDER / name)
    assert cfg.model.backbone.frozen_stages == 12
    assert cfg.model.backbone.drop_path_rate == 0
    # Else statistics of the norm are each process's own, of which a checkpoint holds one.
    assert cfg.model_wrapper_cfg.broadcast_buffers
    assert [hook.type for hook in cfg.custom_hooks] == ['mmhdistill.DataCheck', 'SyncBuffersHook']
    assert cfg.model.backbone.get('drop_rate', 0) == 0
    assert cfg.model.get('train_cfg') is None
    kinds = [transform.type for transform in cfg.train_dataloader.dataset.pipeline]
    assert {'RandomFlip', 'PackInputs'} < set(kinds) <= {
        'LoadImageFromFile', 'Resize', 'RandomResizedCrop', 'RandomCrop', 'RandomFlip', 'PackInputs'}


def end_epoch_twice(rank, checkpoint, folder):
    """Four steps, then the last two again from what the first process would have saved."""
    cfg = tiny(LINEAR[0], checkpoint)
    model = build(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapped = MODEL_WRAPPERS.build(dict(cfg.model_wrapper_cfg, module=model, device_ids=None))
    batches = []
    for step in range(4):
        (folder / f'{rank}{step}').mkdir()
        batches.append(make_batch(cfg, folder / f'{rank}{step}'))
        batches[-1]['inputs'] = [x + 40 * (2 * step + rank) for x in batches[-1]['inputs']]
    ends = []
    for begin in (0, 2):
        for step in range(begin, 4):
            wrapped.train_step(batches[step], optim_wrapper)
            if (begin, step) == (0, 1):
                saved = [copy.deepcopy(model.state_dict())]
        SyncBuffersHook().after_train_epoch(SimpleNamespace(model=wrapped))
        ends.append(copy.deepcopy(model.neck[1].bn.state_dict()))
        broadcast_object_list(saved)
        model.load_state_dict(saved[0])
    torch.save(ends, folder / f'{rank}.pth')


@pytest.mark.slow
def test_linear__statistics_are_those_of_a_run_that_was_not_stopped_in_all_processes(checkpoint, tmp_path):
    spawn(end_epoch_twice, tmp_path, checkpoint, tmp_path)
    ends = [end for rank in (0, 1) for end in torch.load(tmp_path / f'{rank}.pth', weights_only=True)]
    assert ends[0]['running_mean'].abs().max() > 0.01
    for end in ends[1:]:
        assert {name: (x == ends[0][name]).all().item() for name, x in end.items()} == dict.fromkeys(ends[0], True)


@pytest.mark.parametrize('name', CONFIGS)
def test_config__is_what_its_name_says(name):
    cfg = Config.fromfile(FOLDER / name)
    size, method, epochs, data = re.fullmatch(NAME, name).groups()
    arch, width = dict(b=('base', 768), l=('large', 1024), tiny=('deit-tiny', 192))[size]
    assert cfg.model.backbone.arch == arch
    if method == 'knn':
        assert (cfg.model.head.type, cfg.test_evaluator.type) == ('mmhdistill.FeatureHead', 'mmhdistill.KNNMetric')
        assert cfg.train_dataloader is None
        return
    assert cfg.model.head.in_channels == width
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == CLASSES[data]
    assert cfg.model.head.loss.get('num_classes') == (CLASSES[data] if method == 'ft' else None)
    assert cfg.model.backbone.img_size == dict(cifar10=32, caltech101=64).get(data, 224)
    assert epochs is None or cfg.train_cfg.max_epochs == int(epochs)
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('mmhdistill:work_dirs/vit-')
    if method == 'linear':
        assert cfg.model.neck[1].input_features == width


@pytest.mark.parametrize('name, epochs, decay, drop_path', [
    ('vit-b_ft-100e_in1k.py', 100, 0.65, 0.1), ('vit-l_ft-50e_in1k.py', 50, 0.75, 0.2)
])
def test_finetune__the_recipe_of_in1k(name, epochs, decay, drop_path):
    cfg = Config.fromfile(FOLDER / name)
    assert (cfg.train_cfg.max_epochs, cfg.auto_scale_lr.base_batch_size) == (epochs, 1024)
    assert cfg.model.backbone.drop_path_rate == drop_path
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 5e-4 * 1024 / 256, 0.05)
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == decay
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 5
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert [(augment.type, augment.alpha) for augment in cfg.model.train_cfg.augments] == [
        ('Mixup', 0.8), ('CutMix', 1.0)]
    transforms = {transform.type: transform for transform in cfg.train_dataloader.dataset.pipeline}
    policy = transforms['RandAugment']
    assert (policy.num_policies, policy.magnitude_level, policy.magnitude_std) == (2, 9, 0.5)
    assert transforms['RandomErasing'].erase_prob == 0.25


@pytest.mark.parametrize('name', TRAINED)
def test_config__base_batch_is_that_of_its_command(name):
    cfg, text = Config.fromfile(FOLDER / name), (FOLDER / name).read_text()
    path = f'configs/transfer/classification/{name}'
    command = re.search(rf'^#   (tools/dist_train\.sh|python tools/train\.py) {path}(?: (\d+))?$', text, re.MULTILINE)
    batch = int(command[2] or 1) * cfg.train_dataloader.batch_size * cfg.optim_wrapper.get('accumulative_counts', 1)
    assert batch == cfg.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('name', CONFIGS)
def test_config__base_by_package_name(name, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = 'mmhdistill::transfer/classification/{name}'\nlog_level = 'ERROR'\n")
    cfg, original = Config.fromfile(path), Config.fromfile(FOLDER / name)
    assert (cfg.pop('log_level'), original.pop('log_level')) == ('ERROR', 'INFO')
    assert cfg.to_dict() == original.to_dict()


@pytest.mark.parametrize('name', [name for name in TRAINED if not re.search('inat19|cifar10.py|caltech', name)])
def test_dataset__of_mmpretrain_takes_these_arguments_and_has_these_classes(name, tmp_path):
    cfg = Config.fromfile(FOLDER / name)
    (tmp_path / 'cars_annos.mat').touch()
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            dataset = DATASETS.build({**loader.dataset, 'data_root': str(tmp_path), 'lazy_init': True})
        assert len(dataset.metainfo['classes']) == cfg.model.head.num_classes
    assert cfg.train_dataloader.dataset.split == 'train'
    assert cfg.val_dataloader.dataset.split == cfg.test_dataloader.dataset.split != 'train'


def small_run(name, folder, checkpoint, train=('a', 'b'), val=('a', 'b'), num_classes=2):
    """The config on two folders of classes, for one epoch of two steps."""
    for split, classes in dict(train=train, val=val).items():
        for index, label in enumerate(classes):
            write_images(folder / split, [f'{label}/{i}.png' for i in range(8)], size=40, seed=index)
    cfg = tiny(name, checkpoint)
    cfg.merge_from_dict({
        'work_dir': str(folder / 'run'),
        'model.head.num_classes': num_classes,
        **({'model.head.loss.num_classes': num_classes} if '_ft' in name else {}),
        'data_preprocessor.num_classes': num_classes,
        'train_cfg.max_epochs': 1,
        'train_dataloader.batch_size': 8,
        'train_dataloader.dataset.data_root': str(folder / 'train'),
        'val_dataloader.dataset.data_root': str(folder / 'val'),
        'test_dataloader.dataset.data_root': str(folder / 'val'),
        'experiment_name': f'run-{folder.name}',
    })
    cfg.model.data_preprocessor = cfg.data_preprocessor
    cfg.param_scheduler = None
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    return cfg


def test_run__trains_and_validates(checkpoint, tmp_path):
    runner = Runner.from_cfg(small_run('vit-tiny_ft_cifar10.py', tmp_path, checkpoint))
    runner.train()
    assert runner.iter == 2
    assert runner.message_hub.get_scalar('val/accuracy/top1').current() in [100 * i / 16 for i in range(17)]


@pytest.mark.parametrize('name', ['vit-tiny_ft_cifar10.py', 'vit-tiny_linear_caltech101.py'])
@pytest.mark.parametrize('train, val, message', [
    ('abc', 'abc', r'the data have 3 classes \(a, b, c\), and the model has model.*head.num_classes=2'),
    ('ab', 'b', r'the 1 classes of val_dataloader are not the 2 of train: it lacks a and has none'),
    ('ab', 'ac', r'the 2 classes of val_dataloader are not the 2 of train: it lacks b and has c'),
])
def test_run__folders_of_other_classes_are_refused_before_the_first_step(name, train, val, message, checkpoint,
                                                                         tmp_path):
    runner = Runner.from_cfg(small_run(name, tmp_path, checkpoint, train, val))
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert runner.iter == 0


def test_knn__of_a_distiller_checkpoint(distiller, checkpoint, tmp_path):
    for split in ('bank', 'query'):
        for index, label in enumerate('abc'):
            write_images(tmp_path / split, [f'{label}/{i}.png' for i in range(10)], size=32, seed=index)
    cfg = tiny('vit-b_knn_in1k.py')
    plain = [dict(type='LoadImageFromFile'), dict(type='PackInputs', meta_keys=('img_path', 'split'))]
    for dataset, split in zip(cfg.test_dataloader.dataset.datasets, ('bank', 'query')):
        dataset.update(data_root=str(tmp_path / split), pipeline=plain, stride=1)
        assert dataset.split == split
    cfg.test_dataloader.update(num_workers=0, batch_size=7)
    cfg.merge_from_dict(dict(work_dir=str(tmp_path / 'run'), load_from=str(checkpoint), experiment_name='knn'))
    runner = Runner.from_cfg(cfg)
    found = runner.test()
    samples = []
    for batch in runner.test_dataloader:
        data = runner.model.data_preprocessor(batch, False)
        for ours, theirs in zip(runner.model.test_step(batch), distiller.predict(data['inputs'])):
            torch.testing.assert_close(ours.feature, theirs.feature, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours.cls_feature, theirs.cls_feature, rtol=1e-5, atol=1e-6)
            samples.append((ours.split, int(ours.gt_label), ours.feature, ours.cls_feature))
    assert len(samples) == 60
    for key, column in (('knn/patch', 2), ('knn/cls', 3)):
        parts = []
        for split in ('bank', 'query'):
            chosen = [sample for sample in samples if sample[0] == split]
            parts += [torch.stack([sample[column] for sample in chosen]), torch.tensor([s[1] for s in chosen])]
        assert found[key] == knn_accuracy(*parts)


@pytest.mark.slow
def test_knn__of_a_bare_vit_is_refused(distiller, tmp_path):
    path = tmp_path / 'bare.pth'
    torch.save(dict(state_dict=distiller.backbone.state_dict()), path)
    write_images(tmp_path, [f'{split}/{label}/0.png' for split in ('bank', 'query') for label in 'ab'])
    cfg = tiny('vit-b_knn_in1k.py')
    for dataset, split in zip(cfg.test_dataloader.dataset.datasets, ('bank', 'query')):
        dataset.update(data_root=str(tmp_path / split), stride=1)
    cfg.test_dataloader.num_workers = 0
    cfg.dump(str(tmp_path / 'knn.py'))
    done = subprocess.run([sys.executable, str(ROOT / 'tools/test.py'), 'knn.py', 'bare.pth'], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode != 0
    message = r'no tensor of the checkpoint \(cls_token, .*\) is one of ImageClassifier \(backbone\.cls_token, .*'
    assert re.search(message, done.stderr)


def test_knn__bank_and_queries_of_other_classes_are_refused(checkpoint, tmp_path):
    write_images(tmp_path, ['bank/a/0.png', 'bank/b/0.png', 'query/b/0.png'])
    cfg = tiny('vit-b_knn_in1k.py')
    for dataset, split in zip(cfg.test_dataloader.dataset.datasets, ('bank', 'query')):
        dataset.update(data_root=str(tmp_path / split), stride=1)
    message = 'meta information of the 2-th dataset does not match'
    with DefaultScope.overwrite_default_scope(cfg.default_scope), pytest.raises(ValueError, match=message):
        DATASETS.build(cfg.test_dataloader.dataset)


@pytest.mark.slow
def test_config__in_the_train_py_of_mmpretrain(checkpoint, tmp_path):
    """Which imports our package only when it reads the config."""
    cfg = small_run('vit-tiny_ft_cifar10.py', tmp_path, checkpoint)
    cfg.dump(str(tmp_path / 'mine.py'))
    script = Path(mmpretrain.__file__).parent / '.mim/tools/train.py'
    done = subprocess.run([sys.executable, str(script), str(tmp_path / 'mine.py')], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'is the checkpoint of a distiller' in done.stdout + done.stderr
    assert (tmp_path / 'run/epoch_1.pth').is_file()


def test_metafile__lists_the_configs():
    listed = re.findall(r'Config: configs/transfer/classification/(\S+\.py)', (FOLDER / 'metafile.yml').read_text())
    assert sorted(listed) == CONFIGS
    assert 'configs/transfer/classification/metafile.yml' in (ROOT / 'model-index.yml').read_text()
