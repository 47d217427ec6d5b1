import subprocess
import sys

import mmcv
import pytest
import torch
from mmengine.logging import MessageHub

from mmhdistill.analysis import benchmark
from mmhdistill.analysis.benchmark import TrainingStep, loss_variants, measure_parts, measure_time
from tests.helpers import snapshot, tiny_distiller, write_images


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as they are added; each look at it takes one."""
    class Clock:
        now = 0.0

        def __call__(self):
            self.now += 1
            return self.now
    clock = Clock()
    monkeypatch.setattr(benchmark.time, 'perf_counter', clock)
    return clock


def test_measure_time__median_without_the_first_run(clock):
    slow = iter([500.0, 20.0, 30.0, 200.0])

    def run():
        clock.now += next(slow)
    assert measure_time(dict(a=run, b=lambda: None), 3) == dict(a=31.0, b=1.0)


def test_measure_memory__of_the_peak():
    # In a process of its own: a peak never falls, and is not that of the process which starts it either. The first call
    # loads libraries and starts threads.
    held = torch.ones(2**28)  # noqa: F841
    code = ('import torch; from mmhdistill.analysis.benchmark import measure_memory\n'
            'run = lambda n: torch.ones(n).sum()\n'
            'run(2**20)\n'
            'print(measure_memory(lambda: run(2**26), steps=2))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(256, rel=0.02)


@pytest.mark.parametrize('way', ['naive', 'ours'])
def test_training_step__trains_the_student_alone(way):
    step = TrainingStep(tiny_distiller(masker=None), 2, way)
    before = snapshot(step.distiller.backbone)
    teachers = {name: snapshot(teacher) for name, teacher in step.distiller.teachers.items()}
    step()
    after = snapshot(step.distiller.backbone)
    assert [name for name in after if not torch.equal(after[name], before[name])]
    for name, teacher in step.distiller.teachers.items():
        for key, value in snapshot(teacher).items():
            assert torch.equal(value, teachers[name][key])


def test_training_step__both_ways_take_the_same_step():
    weights = []
    for way in ('naive', 'ours'):
        step = TrainingStep(tiny_distiller(masker=None), 2, way)
        step()
        weights.append(snapshot(step.distiller.backbone))
    # AdamW's first step is the sign of the gradient: where it is all but zero the sign may differ.
    differ = [(weights[0][name] - weights[1][name]).abs() > 1e-6 for name in weights[0]]
    assert sum(x.sum().item() for x in differ) <= 0.01 * sum(x.numel() for x in differ)


@pytest.mark.parametrize('case, kept, fed', [
    ('step-masked', 67, False), ('step-masked-kept', 67, True), ('step-unmasked', None, False)])
def test_cases__naive_way_masks_nothing(case, kept, fed):
    naive, ours = benchmark.CASES[case](batch=1).values()
    assert naive.distiller.masker is None and not naive.distiller.teachers['mim'].masked
    assert (ours.distiller.masker and ours.distiller.masker.counts(196)[-1]) == kept
    assert ours.distiller.teachers['mim'].masked == fed


def test_measure_parts__make_up_the_step(clock):
    parts = ('teacher clip', 'teacher mae', 'masker', 'student forward', 'loss feature', 'loss relation', 'backward',
             'optimizer')
    # The clock is looked at before and after each part, and each look takes a second.
    assert measure_parts(TrainingStep(tiny_distiller(), 2), 3) == {**dict.fromkeys(parts, 1.0), 'step': 17.0}


@pytest.mark.parametrize('case', benchmark.CASES)
@pytest.mark.parametrize('way', benchmark.WAYS)
def test_cases__one_way_alone(case, way, monkeypatch):
    monkeypatch.setattr(benchmark, 'small_distiller', lambda masker, masked_teacher=False: tiny_distiller(masker=None))
    variants = benchmark.CASES[case](ways=[way])
    assert list(variants) == [way]


def test_loss_variants__same_gradient():
    found = [run().clone() for run in loss_variants(2, 9, heads=3, width=8).values()]
    assert found[0].shape == (2, 2, 9, 24)
    torch.testing.assert_close(*found)


def test_loss_variants__blocks_of_rows(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark, 'relation_kl', lambda *tokens, heads, rows: seen.append(rows) or tokens[0].sum())
    loss_variants(1, 4, heads=1, width=2, rows=3)['ours']()
    assert seen == [3]


def test_overhead_variants__masker_and_hook_keep_every_token(monkeypatch):
    monkeypatch.setattr(benchmark, 'small_distiller', lambda masker: tiny_distiller(
        masker=masker and {**masker, 'teacher': 'mae'}))
    hub = MessageHub.get_instance('benchmark')
    variants = benchmark.overhead_variants(batch=2)
    assert variants['naive'].distiller.masker is None
    variants['ours']()
    assert hub.get_scalar('train/kept_tokens').current() == 16
    assert hub.get_scalar('train/keep_rate').current() == 1


def test_report_variants__a_report_and_a_step(monkeypatch):
    monkeypatch.setattr(benchmark, 'small_distiller', lambda masker: tiny_distiller())
    told = []
    variants = benchmark.report_variants(batch=2)
    report = variants['ours']
    report.args[0].visualizer.add_scalars = lambda scalars, step: told.append(scalars)
    report()
    found, = told
    # Of the images of the step, of all layers, students and teachers.
    assert report.args[0].model is variants['naive'].distiller
    assert {'diversity/nmi/layer_2', 'diversity/rank/layer_2', 'diversity/nmi_mae/layer_2'} <= set(found)


def test_matmul_rate__two_operations_a_term(clock):
    assert benchmark.matmul_rate(side=10, repeats=3) == 2000


def test_data_rate__images_a_second(clock, tmp_path):
    write_images(tmp_path / 'a', [f'{i}.jpg' for i in range(5)])
    read = []

    class Slow:
        def __call__(self, results):
            clock.now += 1
            read.append(results['img_path'])
            return results
    dataset = dict(type='mmhdistill.ImageFolder', data_root=str(tmp_path), pipeline=[Slow()])
    # Two seconds for the images, and one for the look at the clock.
    assert benchmark.data_rate(dataset, count=2) == pytest.approx(2 / 3)
    assert len(read) == 3 and len(set(read)) == 2
    assert benchmark.data_rate(dict(dataset, data_root=str(tmp_path / 'none'))) is None


def test_write_photographs__as_large_as_those_of_imagenet(tmp_path):
    size = benchmark.write_photographs(tmp_path, 3)
    files = sorted(tmp_path.iterdir())
    assert len({file.read_bytes() for file in files}) == 3
    assert size == sum(file.stat().st_size for file in files) / 3
    assert 100_000 < size < 120_000
    assert mmcv.imread(str(files[0])).shape == (375, 500, 3)


def test_cases__are_those_of_the_table():
    assert list(benchmark.CASES) == ['loss-197', 'loss-2305', 'step-masked', 'step-masked-kept', 'step-unmasked']
