"""Every shipped config builds without any file, learns, and says what its name says."""
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import FUNCTIONS, MODELS, DefaultScope

import mmhdistill  # noqa: F401  (lets the package's name resolve in configs)
from tests.helpers import build_distiller, narrow, random_images, spawn, without_gradient, write_images

pytestmark = pytest.mark.usefixtures('free_memory')
ROOT = Path(__file__).parents[2]
CONFIGS = [str(path.relative_to(ROOT)) for folder in ('hdistill', 'moma', 'baselines', 'quickstart')
           for path in sorted((ROOT / 'configs' / folder).glob('*.py'))]
HDISTILL = [name for name in CONFIGS if '/hdistill/' in name]
# Models of the real size: one after the other, since side by side they fill the memory of a small machine.
large = [pytest.mark.slow, pytest.mark.xdist_group('large models')]
by_size = [pytest.param(name, marks=large) if re.search(r'vit-[sbl]_|cifar10', name) else name for name in CONFIGS]


def load(name):
    """The config with teachers of random weights."""
    cfg = Config.fromfile(ROOT / name)
    for teacher in cfg.model.get('teachers', {}).values():
        teacher.checkpoint = None
    if 'init_from' in cfg.model.backbone:
        cfg.model.backbone.init_from.checkpoint = None
    return cfg


def is_distiller(cfg):
    return cfg.model.type == 'mmhdistill.HybridDistiller'


def build(cfg, seed=0):
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    return model


def make_batch(cfg, folder, number=2, seed=0):
    """What the config's own training pipeline makes of ``number`` random images of the model's size."""
    size = cfg.model.backbone.img_size
    dataset = cfg.train_dataloader.dataset
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        pipeline = Compose(dataset.pipeline)
    paths = write_images(folder, [f'{index}.png' for index in range(number)], size=size, seed=seed)
    labels = [dict(gt_label=index) if dataset.get('with_label') else {} for index in range(number)]
    samples = [pipeline(dict(img_path=str(path), **label)) for path, label in zip(paths, labels)]
    return FUNCTIONS.get(cfg.train_dataloader.collate_fn.type)(samples)


def find_crops(pipeline):
    """Sizes of the crops in a pipeline, those inside the views of an image too."""
    sizes = []
    for step in pipeline:
        if isinstance(step, list):
            sizes += find_crops(step)
        elif 'Crop' in step.type:
            sizes.append(step.get('scale') or step.crop_size)
        else:
            sizes += find_crops(step.get('transforms', []))
    return sizes


@pytest.mark.parametrize('name', by_size)
def test_config__learns_at_its_own_size(name, tmp_path):
    cfg = load(name)
    model = build(cfg).train()
    data = model.data_preprocessor(make_batch(cfg, tmp_path), True)
    # The crop's size, which may be less than the model's; images without one are written at the model's.
    size = (find_crops(cfg.train_dataloader.dataset.pipeline) or [cfg.model.backbone.img_size])[0]
    # MoCo v3 sees two views of an image.
    views = data['inputs'] if cfg.model.type == 'MoCoV3' else [data['inputs']]
    assert [view.shape for view in views] == [(2, 3, size, size)] * (2 if cfg.model.type == 'MoCoV3' else 1)
    losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    assert total > 0
    total.backward()
    assert without_gradient(model) == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    if is_distiller(cfg):
        expected = [loss for loss, settings in cfg.model.losses.items() if settings.get('loss_weight', 1) != 0]
        assert list(losses) == [f'loss/{loss}' for loss in expected]
        assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
        assert set(model.teachers) == {cfg.model.losses[loss].teacher for loss in expected}
    if name in HDISTILL:
        assert list(losses) == ['loss/feature', 'loss/relation']


def take_two_steps(rank, names, folder):
    torch.set_num_threads(1)
    # A Runner says so; MoCo v3's momentum follows it.
    MessageHub.get_current_instance().update_info('max_iters', 2)
    report = {}
    for name in names:
        cfg = load(name)
        model = MMDistributedDataParallel(build(cfg), find_unused_parameters=False, gradient_as_bucket_view=True)
        # Plain descent needs no memory of its own.
        wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)))
        model.train()
        report[name] = []
        for step in range(2):
            # Batch norm needs two, and of two leaves the signs alone, which two processes may share.
            number = 4 if cfg.model.type == 'MoCoV3' else 1
            batch = make_batch(cfg, folder / f'{rank}', number=number, seed=2 * step + rank)
            losses = model.train_step(batch, wrapper)
            checksum = sum(p.detach().double().abs().sum() for p in model.parameters()).item()
            report[name].append(({key: value.item() for key, value in losses.items()}, checksum))
        del model, wrapper
        gc.collect()
    (folder / f'report-{rank}.json').write_text(json.dumps(report))


@pytest.mark.slow
@pytest.mark.xdist_group('large models')
def test_config__two_steps_in_two_processes_without_find_unused_parameters(tmp_path):
    # Recipes that differ in the length of training alone have one model.
    models = {repr(load(name).model): name for name in CONFIGS}
    # The largest first: later models find their memory free.
    names = sorted(models.values(), key=lambda name: 'vit-l' not in name)
    assert len(names) >= 6
    spawn(take_two_steps, tmp_path, names, tmp_path)
    first, second = (json.loads((tmp_path / f'report-{rank}.json').read_text()) for rank in range(2))
    for name in names:
        for step in range(2):
            losses, checksum = first[name][step]
            other, other_checksum = second[name][step]
            assert all(0 < loss < float('inf') for loss in losses.values())
            # Another image in each process, and still the same weights.
            assert losses['loss'] != other['loss'], name
            assert checksum == other_checksum
        assert first[name][0][1] != first[name][1][1]


@pytest.mark.slow
@pytest.mark.xdist_group('large models')
def test_config__builds_in_a_clean_process_without_any_file(tmp_path):
    script = """
import gc, sys
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
for path in sys.argv[1:]:
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    for teacher in cfg.model.get('teachers', {}).values():
        teacher.checkpoint = None
    model = MODELS.build(cfg.model)
    print('built', len(list(model.parameters())))
    del model
    gc.collect()
"""
    empty = tmp_path / 'empty'
    empty.mkdir()
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TORCH_HOME': str(empty), 'MMHDISTILL_CACHE': str(empty)}
    done = subprocess.run([sys.executable, '-c', script, *(str(ROOT / name) for name in CONFIGS)],
                          cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r'^built \d+$', done.stdout, re.MULTILINE)) == len(CONFIGS)
    assert list(empty.iterdir()) == []


def test_config__base_by_package_name(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'mmhdistill::hdistill/vit-b_clip-mae_300e.py'\ntrain_cfg = dict(max_epochs=7)\n")
    cfg = Config.fromfile(path)
    original = Config.fromfile(ROOT / 'configs/hdistill/vit-b_clip-mae_300e.py')
    # Nothing but the length differs, not a scope either, in which mmpretrain's parts would not be found.
    assert (cfg.train_cfg.pop('max_epochs'), original.train_cfg.pop('max_epochs')) == (7, 300)
    assert cfg.to_dict() == original.to_dict()


SCOPED = """
import json, sys
from importlib import import_module
from mmengine.registry import init_default_scope
import mmhdistill
from tests.helpers import build_distiller, narrow, random_images, tiny_distiller, randomise
import torch
init_default_scope(sys.argv[1])
import_module(sys.argv[1] + '.utils').register_all_modules(init_default_scope=True)
torch.manual_seed(0)
model = import_module(sys.argv[1] + '.registry').MODELS.build(tiny_distiller())
model.init_weights()
for module in (model, *model.teachers.values()):
    randomise(module)
print(json.dumps({name: loss.item() for name, loss in model(random_images(), mode='loss').items()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_distiller__built_from_inside_another_project(scope):
    done = subprocess.run([sys.executable, '-c', SCOPED, scope], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    expected = build_distiller()(random_images(), mode='loss')
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, rel=1e-5)


@pytest.mark.parametrize('name', HDISTILL)
def test_hdistill__is_what_its_name_says(name):
    cfg = Config.fromfile(ROOT / name)
    size, feature, relation, data = re.search(r'vit-(\w+)_(\w+)-(\w+)_(.*)\.py', name).groups()
    assert cfg.model.backbone.arch == dict(b='base', l='large', tiny='deit-tiny')[size]
    assert {loss: settings.teacher for loss, settings in cfg.model.losses.items()} == dict(
        feature=feature, relation=relation)
    for teacher in (feature, relation):
        assert re.fullmatch(rf"{teacher}-vit-{'l' if size == 'l' else 'b'}-p\d+", cfg.model.teachers[teacher].card)
    assert set(cfg.model.teachers) == {feature, relation}
    epochs = re.search(r'(\d+)e$', data)
    assert cfg.train_cfg.max_epochs == (int(epochs[1]) if epochs else 100)
    # alpha = beta = 1.
    assert [settings.get('loss_weight', 1.0) for settings in cfg.model.losses.values()] == [1.0, 1.0]


@pytest.mark.parametrize('name', CONFIGS)
def test_config__base_batch_is_that_of_its_command(name):
    cfg = Config.fromfile(ROOT / name)
    text = (ROOT / name).read_text()
    command = re.search(rf'^#   (tools/dist_train\.sh|python tools/train\.py) {name}(?: (\d+))?$', text, re.MULTILINE)
    processes = int(command[2] or 1)
    batch = processes * cfg.train_dataloader.batch_size * cfg.optim_wrapper.get('accumulative_counts', 1)
    assert batch == cfg.auto_scale_lr.base_batch_size
    if processes == 8:
        assert (batch, cfg.optim_wrapper.optimizer.lr) == (2048, pytest.approx(1.2e-3))


@pytest.mark.parametrize('name', CONFIGS)
def test_config__learning_rate_falls_to_the_end_of_training(name):
    cfg = Config.fromfile(ROOT / name)
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.type, cosine.type) == ('LinearLR', 'CosineAnnealingLR')
    assert warm_up.begin == 0
    assert warm_up.end == cosine.begin < cfg.train_cfg.max_epochs / 2
    # mmengine fills in the end of training.
    assert 'end' not in cosine and 'T_max' not in cosine


@pytest.mark.parametrize('name', CONFIGS)
def test_config__weight_decay_spares_norms_biases_and_tokens(name):
    cfg = load(name)
    # The config's own losses, with heads of their own.
    model = build_distiller(**narrow(cfg.model.to_dict())) if is_distiller(cfg) else build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    learned = {parameter: p for parameter, p in model.named_parameters() if p.requires_grad}
    # Weights of linear layers and convolutions alone: norms and biases are vectors, tokens and positions (1, N, C).
    expected = {parameter: 0.05 if p.ndim > 1 and len(p) > 1 else 0 for parameter, p in learned.items()}
    assert {parameter: decay[id(p)] for parameter, p in learned.items()} == expected
    assert 0.3 < sum(value > 0 for value in expected.values()) / len(expected) < 0.5


@pytest.mark.parametrize('path', [str(path.relative_to(ROOT)) for path in sorted((ROOT / 'configs').rglob('*.py'))])
def test_config__names_no_download_of_openmmlab(path):
    assert (ROOT / path).read_text().count('download.openmmlab.com') == 0


@pytest.mark.parametrize('folder', ['hdistill', 'moma', 'baselines'])
def test_metafile__lists_the_configs(folder):
    path = f'configs/{folder}/metafile.yml'
    assert sorted(re.findall(r'Config: (configs/\S+\.py)', (ROOT / path).read_text())) == [
        name for name in CONFIGS if f'/{folder}/' in name]
    assert path in (ROOT / 'model-index.yml').read_text()


def test_moma__is_what_its_name_says():
    names = [name for name in CONFIGS if '/moma/' in name]
    assert len(names) == 6
    for name in names:
        cfg = Config.fromfile(ROOT / name)
        size, first, to, second, masked = re.search(
            r'vit-(\w)_(moco|mae)-(to-)?(moco|mae)(?:_mask-(\d+))?_100e\.py', name).groups()
        cards = dict(moco='mocov3-vit-b-p16', mae='mae-vit-b-p16')
        # moco-to-mae: the teacher, and what the student starts from; moco-mae: two teachers.
        teachers = [first] if to else [first, second]
        assert {teacher: settings.card for teacher, settings in cfg.model.teachers.items()} == {
            teacher: cards[teacher] for teacher in teachers}
        assert cfg.model.backbone.get('init_from') == (dict(card=cards[second]) if to else None)
        assert {settings.teacher for settings in cfg.model.losses.values()} == set(teachers)
        assert all(settings.projector.type == 'mmhdistill.MLPProjector' and settings.include_cls
                   for settings in cfg.model.losses.values())
        assert cfg.model.backbone.arch == dict(s='deit-small', b='base')[size]
        assert cfg.model.masker.keep_rate == pytest.approx(1 - int(masked or 90) / 100)
        assert (cfg.model.masker.num_stages, cfg.train_cfg.max_epochs) == (1, 100)


def test_baselines__are_what_their_names_say():
    """Sizes and teachers; tests/models/distillers/test_reductions.py takes the losses and maskers as shipped."""
    names = [name for name in CONFIGS if '/baselines/' in name]
    assert len(names) == 5
    for name in names:
        cfg = Config.fromfile(ROOT / name)
        size, teacher = re.search(r'_vit-([sb])_(clip|mae)(?:-b)?_300e\.py', name).groups()
        built = {loss.teacher for loss in cfg.model.losses.values() if loss.get('loss_weight', 1) != 0}
        assert {cfg.model.teachers[used].card for used in built} == {f'{teacher}-vit-b-p16'}
        assert cfg.model.backbone.arch == dict(s='deit-small', b='base')[size]
        assert cfg.train_cfg.max_epochs == 300


@pytest.mark.slow
@pytest.mark.xdist_group('large models')
def test_moma__masked_student_costs_a_fifth_at_most():
    """Of the unmasked student's part of a step, in arithmetic and in time."""
    student = build(load('configs/moma/vit-b_moco-mae_100e.py')).train().backbone
    taps = {11: frozenset({'features'})}
    # 196 patches, of which round(19.6) are fed.
    assert student.flops([20] * 12, taps) < 0.12 * student.flops([196] * 12, taps)
    images, keep_ids = torch.randn(4, 3, 224, 224), torch.arange(20).expand(4, -1)

    def seconds(reduce):
        start = time.process_time()  # what else runs on the machine takes none of it
        student.encode(images, taps, reduce).taps[11, 'features'].square().mean().backward()
        return time.process_time() - start

    def masked(index, recorded):
        return keep_ids if index == 0 else None

    pairs = [(seconds(masked), seconds(None)) for _ in range(4)]
    assert min(part for part, _ in pairs) <= 0.2 * min(whole for _, whole in pairs)
