"""What the study measures of a model, on a few random images."""
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmhdistill.functional import knn_predict
from mmhdistill.registry import MODELS
from studies.hybrid_on_cifar10 import cost, measure

STUDY = Path(measure.__file__).parent


@pytest.fixture
def recipe():
    """With random teachers, and the checkpoint of a student after no step."""
    cfg = Config.fromfile(STUDY / 'cpu/hybrid.py')
    for teacher in cfg.model.teachers.values():
        teacher.checkpoint = None
    return cfg


@pytest.fixture
def checkpoint(recipe, tmp_path):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = MODELS.build(recipe.model)
    distiller.init_weights()
    path = tmp_path / 'epoch_12.pth'
    torch.save(dict(state_dict=distiller.state_dict(), meta={}), path)
    return path


def ratio(recipe, checkpoint):
    torch.manual_seed(1)
    images = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return measure.gradient_ratio(recipe.pretty_text, checkpoint, images)


def test_gradient_ratio__grows_with_the_weight(recipe, checkpoint):
    once = ratio(recipe, checkpoint)
    recipe.model.losses.relation.loss_weight *= 3
    assert ratio(recipe, checkpoint) == pytest.approx(3 * once, rel=1e-4)
    recipe.model.losses.feature.loss_weight = 3.0
    assert ratio(recipe, checkpoint) == pytest.approx(once, rel=1e-4)


def test_gradient_ratio__none_of_a_student_of_one_loss(recipe, checkpoint):
    recipe.model.losses.relation = None
    recipe.model.masker = None
    assert ratio(recipe, checkpoint) is None


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return {split: (torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8),
                    torch.arange(count) % 4) for split, count in (('train', 60), ('test', 40))}


def unpacked(text, count=40):
    return torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)))[:count].bool()


def test_measure__student_of_a_checkpoint(recipe, checkpoint, data, monkeypatch):
    asked = []
    monkeypatch.setattr(measure, 'gradient_ratio', lambda *args: asked.append(args) or 0.5)
    model = measure.Model('grid-a-0', 'a', 0, checkpoint, 'grid', recipe.pretty_text)
    found = measure.measure('cpu', model, data)
    # By the student as the distiller runs it, on images normalised as it was trained.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = MODELS.build(recipe.model)
    distiller.init_weights()
    distiller.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'])
    distiller.eval()
    mean, std = distiller.data_preprocessor.mean, distiller.data_preprocessor.std
    samples = {split: distiller.predict((images - mean) / std) for split, (images, _) in data.items()}
    for name, field in (('knn', 'feature'), ('knn_cls', 'cls_feature')):
        bank, queries = (torch.stack([sample.get(field) for sample in samples[split]]) for split in ('train', 'test'))
        want = knn_predict(bank, data['train'][1], queries, num_classes=4) == data['test'][1]
        assert found[name] == pytest.approx(100 * want.double().mean().item())
        if name == 'knn':
            assert torch.equal(unpacked(found['right']['knn']), want)
    assert found['linear'] == pytest.approx(100 * unpacked(found['right']['linear']).double().mean().item())
    (text, file, images), = asked
    assert (found['gradient_ratio'], text, file) == (0.5, recipe.pretty_text, checkpoint)
    assert torch.equal(images, measure.spread(data['train'][0], 256))


def test_spread__over_all_classes():
    images = torch.arange(10_000)
    chosen = measure.spread(images, 256)
    assert len(chosen) == 256
    assert torch.bincount(chosen // 1000, minlength=10).min() >= 25


def test_classify__is_the_fine_tuned_model(tmp_path, data):
    run = measure._finetune('cpu', tmp_path, 'a', 0, {'model.backbone.init_cfg': None})
    cfg = Config.fromstring(run.recipe, '.py')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    model.init_weights()
    run.folder.mkdir(parents=True)
    torch.save(dict(state_dict=model.state_dict()), run.folder / 'epoch_8.pth')
    (run.folder / 'last_checkpoint').write_text(str(run.folder / 'epoch_8.pth'))
    model.eval()
    images, _ = data['test']
    # As the test loop feeds it: BGR images through the data preprocessor.
    inputs = model.data_preprocessor(dict(inputs=list(images.flip(1))))['inputs']
    with torch.no_grad():
        want = model(inputs, mode='tensor').argmax(dim=1)
    assert len(want.unique()) > 1
    assert torch.equal(measure.classify(run, images), want)


def test_measure__random_weights(data):
    found, again, other = (measure.measure('cpu', measure.Model('random', 'random weights', seed), data)
                           for seed in (0, 0, 1))
    assert found == again
    assert found['nmi'] != other['nmi']
    for name in ('nmi', 'distance'):
        assert torch.tensor(found[name]).shape == (6, 4)
    assert len(found['rank']) == 6
    # At random weights attention is nearly uniform: of a grid of 8 x 8 patches of 4 px, 16.7 px.
    cell = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    uniform = 4 * torch.cdist(cell, cell).mean().item()
    assert torch.tensor(found['distance']).mean().item() == pytest.approx(uniform, rel=0.03)
    assert 'gradient_ratio' not in found


def test_models__of_finished_runs_alone(tmp_path):
    for name in measure.TEACHERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'last_checkpoint').write_text(f'/elsewhere/{name}/epoch_3.pth')
    for run in ('grid/FD/seed-1', 'sweep/kl-0-1/seed-0', 'grid/relations/seed-0'):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / 'last_checkpoint').write_text('epoch_12.pth')
        if 'relations' not in run:
            (tmp_path / run / 'metrics.json').write_text('{}')
    found = {model.name: (model.cell, model.seed, model.grid, model.checkpoint)
             for model in measure.models('cpu', tmp_path)}
    assert found == {
        **{f'random-{seed}': ('random weights', seed, None, None) for seed in (0, 1)},
        **{f'teacher-{name}': (name, 0, None, tmp_path / name / 'epoch_3.pth') for name in measure.TEACHERS},
        'grid-FD-1': ('FD', 1, 'grid', tmp_path / 'grid/FD/seed-1/epoch_12.pth'),
        'sweep-kl-0-1-0': ('kl 0.1', 0, 'sweep', tmp_path / 'sweep/kl-0-1/seed-0/epoch_12.pth')}


@pytest.fixture
def planned(monkeypatch):
    """Runs that would have been trained."""
    found = []

    def run_all(runs, out, jobs):
        found.extend(runs)
        return [dict(cell=run.cell) for run in runs]
    monkeypatch.setattr(measure, 'run_all', run_all)
    return found


def test_fine_tune__starts_seeds_and_lengths(tmp_path, planned):
    (tmp_path / 'a.pth').write_bytes(b'weights')
    models = [measure.Model('random-1', 'random weights', 1),
              measure.Model('grid-FD-1', 'FD', 1, tmp_path / 'a.pth', 'grid')]
    found = measure.fine_tune('cpu', tmp_path, models, 2)
    assert found == dict(zip(['random-1', 'random-1-longer', 'grid-FD-1'], planned, strict=True))
    # Another file of the same name makes another run.
    assert sha256(b'weights').hexdigest() in planned[2].recipe
    random, longer, student = cfgs = [Config.fromstring(run.recipe, '.py') for run in planned]
    assert random.model.backbone.init_cfg is None and longer.model.backbone.init_cfg is None
    assert student.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=f'mmhdistill:{tmp_path}/a.pth')
    assert [cfg.train_cfg.max_epochs for cfg in cfgs] == [5, 13, 5]
    assert [cfg.optim_wrapper.paramwise_cfg.layer_decay_rate for cfg in cfgs] == [1.0, 1.0, 0.75]
    assert [cfg.randomness.seed for cfg in cfgs] == [1, 1, 1]
    assert len({run.folder for run in planned}) == 3


@pytest.mark.parametrize('name', measure.TEACHERS)
def test_fine_tune__from_every_teacher(name, tmp_path, planned):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        method = MODELS.build(Config.fromfile(STUDY / f'cpu/{name}.py').model)
    method.init_weights()
    torch.save(dict(state_dict=method.state_dict(), meta={}), tmp_path / 'epoch_9.pth')
    measure.fine_tune('cpu', tmp_path, [measure.Model(f'teacher-{name}', name, 0, tmp_path / 'epoch_9.pth')], 1)
    cfg = Config.fromstring(planned[0].recipe, '.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    # As a run does it: strictly.
    model.init_weights()
    for key, x in method.backbone.state_dict().items():
        assert key == 'mask_token' or torch.equal(model.backbone.state_dict()[key], x), key


def test_fine_tune__failure_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, 'run_all', lambda runs, out, jobs: [dict(cell='random', failed='no images')])
    with pytest.raises(SystemExit, match='random: no images'):
        measure.fine_tune('cpu', tmp_path, [], 1)


def test_steps__time_and_memory_of_a_cell(recipe):
    recipe.train_dataloader.batch_size = 4
    found = cost.steps(recipe, warmup=1, count=3)
    assert found['ms'] > 0
    assert found['mib'] >= 0
    json.dumps(found)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs main() on four images, with everything that takes long left out; returns the models that were measured."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    checkpoint = tmp_path / 'a.pth'
    checkpoint.write_bytes(b'weights')
    models = [measure.Model('random-0', 'random weights', 0), measure.Model('a', 'A', 0, checkpoint, 'grid')]
    measured = []
    monkeypatch.setattr(measure, 'models', lambda size, work: models)
    monkeypatch.setattr(measure, 'provenance', lambda: 'here')
    monkeypatch.setattr(measure, 'load_images', lambda folder: images)
    monkeypatch.setattr(measure, 'run_all', lambda runs, out, jobs: [dict(cell=run.cell) for run in runs])
    monkeypatch.setattr(measure, 'frozen', lambda *args: dict(knn=1.0, right={}))
    monkeypatch.setattr(measure, 'measure', lambda size, model, data: measured.append(model.name) or dict(right={}))
    monkeypatch.setattr(measure, 'classify', lambda run, images: torch.arange(4) * ('longer' in run.cell))

    def run():
        measured.clear()
        monkeypatch.setattr('sys.argv', ['measure.py', 'cpu', '--work', str(tmp_path)])
        measure.main()
        return list(measured)
    return run, tmp_path / 'results/cpu', checkpoint


def test_main__measures_what_is_new_alone(study, monkeypatch):
    run, out, checkpoint = study
    assert run() == ['random-0', 'a']
    random, student = (json.loads((out / f'{name}.json').read_text()) for name in ('random-0', 'a'))
    assert (random['finetune'], random['finetune_longer'], student['finetune']) == (25.0, 100.0, 25.0)
    assert set(random['right']) == {'finetune', 'finetune_longer'} and set(student['right']) == {'finetune'}
    (out / 'left-over.json').write_text('{}')
    (out / 'cost.json').write_text('{}')
    assert run() == []
    assert sorted(path.name for path in out.iterdir()) == ['a.json', 'cost.json', 'pixels.json', 'random-0.json']
    # Another checkpoint, and another fine-tuning.
    checkpoint.write_bytes(b'others')
    assert run() == ['a']
    finetune = measure._finetune
    monkeypatch.setattr(measure, '_finetune', lambda *args: finetune(*args[:-1], {**args[-1], 'resume': True}))
    assert run() == ['random-0', 'a']


@pytest.mark.slow
def test_measure_all__in_processes_of_their_own(tmp_path, data):
    run = measure._finetune('cpu', tmp_path, 'a', 0, {'model.backbone.init_cfg': None})
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromstring(run.recipe, '.py').model)
    model.init_weights()
    run.folder.mkdir(parents=True)
    torch.save(dict(state_dict=model.state_dict()), run.folder / 'epoch_8.pth')
    (run.folder / 'last_checkpoint').write_text(str(run.folder / 'epoch_8.pth'))
    todo = [(measure.Model(f'random-{seed}', 'random weights', seed), dict(finetune=run)) for seed in range(3)]
    one, two = (list(measure.measure_all('cpu', todo, data, jobs)) for jobs in (1, 2))
    assert len(one) == 3 and one[0]['nmi'] != one[1]['nmi']
    for mine, theirs in zip(one, two, strict=True):
        assert mine['right'] == theirs['right'] and set(mine['right']) == {'knn', 'linear', 'finetune'}
        assert mine['finetune'] == theirs['finetune']
        torch.testing.assert_close(torch.tensor(mine['nmi']), torch.tensor(theirs['nmi']))
