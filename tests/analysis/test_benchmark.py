import time

import pytest
import torch

from mmhdistill.analysis import benchmark
from mmhdistill.analysis.benchmark import TrainingStep, loss_variants, measure_memory, measure_parts, measure_time
from tests.helpers import snapshot, tiny_distiller


def test_measure_time__median_without_the_first_run():
    slow = iter([0.5, 0.02, 0.02, 0.2])
    taken = measure_time(dict(a=lambda: time.sleep(next(slow)), b=lambda: None), 3)
    assert taken['a'] == pytest.approx(0.02, abs=0.015)
    assert taken['b'] < 0.005


def test_measure_memory__of_the_peak():
    def run():
        torch.ones(2**23).sum()
    assert measure_memory(run, steps=2) == pytest.approx(32, abs=4)


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


def test_measure_parts__make_up_the_step():
    step = TrainingStep(tiny_distiller(), 16)
    found = measure_parts(step, 5)
    assert set(found) == {'teacher clip', 'teacher mae', 'masker', 'student forward', 'loss feature', 'loss relation',
                          'backward', 'optimizer', 'step'}
    whole = found.pop('step')
    assert 0.7 * whole < sum(found.values()) < 1.1 * whole


def test_loss_variants__same_gradient():
    found = [run().clone() for run in loss_variants(2, 9, heads=3, width=8).values()]
    assert found[0].shape == (2, 2, 9, 24)
    torch.testing.assert_close(*found)


def test_cases__are_those_of_the_table():
    assert list(benchmark.CASES) == ['loss-197', 'loss-2305', 'step-masked', 'step-masked-kept', 'step-unmasked']
