import subprocess
import sys

import pytest
import torch

from mmhdistill.analysis import benchmark
from mmhdistill.analysis.benchmark import TrainingStep, loss_variants, measure_parts, measure_time
from tests.helpers import snapshot, tiny_distiller


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


def test_measure_parts__make_up_the_step(clock):
    parts = ('teacher clip', 'teacher mae', 'masker', 'student forward', 'loss feature', 'loss relation', 'backward',
             'optimizer')
    # The clock is looked at before and after each part, and each look takes a second.
    assert measure_parts(TrainingStep(tiny_distiller(), 2), 3) == {**dict.fromkeys(parts, 1.0), 'step': 17.0}


def test_loss_variants__same_gradient():
    found = [run().clone() for run in loss_variants(2, 9, heads=3, width=8).values()]
    assert found[0].shape == (2, 2, 9, 24)
    torch.testing.assert_close(*found)


def test_cases__are_those_of_the_table():
    assert list(benchmark.CASES) == ['loss-197', 'loss-2305', 'step-masked', 'step-masked-kept', 'step-unmasked']
