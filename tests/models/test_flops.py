import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmhdistill.models import MaskableVisionTransformer, ProgressiveTokenMasker, ViTTeacher
from mmhdistill.models.taps import merge_taps
from tests.helpers import tiny_card, tiny_student

from .conftest import random

TAPS = {
    'features': {2: frozenset({'features'})},
    'hidden of all': dict.fromkeys(range(3), frozenset({'hidden'})),
    'hidden of the middle': {1: frozenset({'hidden'})},
    'q': {1: frozenset('q')},
    'k': {2: frozenset('k')},
    'q and k': {1: frozenset('qk')},
    'q and v, with k between them': {2: frozenset('qv')},
    'k and v of the first': {0: frozenset('kv')},
    'all of attention, and more before': {0: frozenset('q'), 1: frozenset({'hidden', 'v'}), 2: frozenset('qkv')},
    'attention of a block that runs to its end': {2: frozenset({'q', 'hidden'})},
}
CARDS = {
    'plain': dict(),
    'CLIP': dict(pre_norm=True, activation='quick_gelu'),
    'gated MLP and layer scale': dict(swiglu=True, layer_scale=True),
    'registers': dict(registers=4),
    'no class token': dict(class_token=False, activation='gelu_tanh', mlp_ratio=3.0),
}


def counted(run):
    """What torch counts; the kernel that fuses attention on CPUs is not in its list."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter


def build_student():
    student = MaskableVisionTransformer(**{key: x for key, x in tiny_student().items() if key != 'type'})
    student.eval()
    return student


@pytest.fixture(params=TAPS)
def taps(request):
    return TAPS[request.param]


@pytest.mark.parametrize('card', CARDS)
def test_encoder_flops__of_a_teacher_are_those_that_torch_counts(card, taps):
    teacher = ViTTeacher(tiny_card(**CARDS[card]), checkpoint=None)
    expected = counted(lambda: teacher(random(1, 3, 32, 32), (4, 4), taps)).get_total_flops()
    assert round(teacher.describe_run((4, 4), taps)['gflops'] * 1e9) == expected
    assert expected > 2e5


@pytest.mark.parametrize('grid, image_size', [((3, 5), None), ((4, 4), (48, 24))])
def test_encoder_flops__of_an_oblong_grid(grid, image_size, taps):
    teacher = ViTTeacher(tiny_card(patch_size=4, img_size=16), checkpoint=None, image_size=image_size)
    images = random(1, 3, 8 * grid[0], 8 * grid[1])
    expected = counted(lambda: teacher(images, grid, taps)).get_total_flops()
    assert round(teacher.describe_run(grid, taps)['gflops'] * 1e9) == expected


def test_encoder_flops__of_a_student(taps):
    student = build_student()
    expected = counted(lambda: student.encode(random(1, 3, 32, 32), taps)).get_total_flops()
    assert student.flops([16] * 3, taps) == expected


@pytest.mark.parametrize('place', ['input', 'encoder'])
def test_encoder_flops__of_dropped_tokens(place, taps):
    student = build_student()
    scorer = dict(type='mmhdistill.RandomScorer')
    masker = ProgressiveTokenMasker(place, keep_rate=0.7, scorer=scorer)
    masker.bind(student.spec)
    reduce = masker.reducer(1, 16, torch.device('cpu'), None)
    expected = counted(lambda: student.encode(random(1, 3, 32, 32), taps, reduce)).get_total_flops()
    assert student.flops(masker.kept_by_layer(16, 3), taps) == expected
    # But for the first block of encoder masking, dropped tokens cost nothing.
    if place == 'input' or max(taps) > 0:
        assert expected < student.flops([16] * 3, taps)


def test_encoder_flops__closed_form():
    student, tokens, width = build_student(), 17, 32
    linear = 4 * width**2 + 2 * width * 64
    stem, block = 2 * 16 * 3 * 8**2 * width, 2 * tokens * linear + 4 * tokens**2 * width
    assert student.flops([16] * 3, TAPS['features']) == stem + 3 * block
    assert student.flops([16] * 3, TAPS['q and k']) == stem + block + 2 * tokens * 2 * width**2
    assert student.flops([16] * 3, TAPS['q and v, with k between them']) == stem + 2 * block + 2 * tokens * 3 * width**2


@pytest.mark.parametrize('tokens', [[16, 16, 16], [5, 5, 5], [16, 11, 8]])
def test_encoder_flops__a_training_step_is_three_forwards(tokens, taps):
    student = build_student()
    student.freeze_unused(taps)
    images = random(1, 3, 32, 32)

    def reduce(index, _):
        previous = 16 if index == 0 else tokens[index - 1]
        return None if tokens[index] == previous else torch.arange(tokens[index])[None]

    def step():
        sum(x.square().sum() for x in student.encode(images, taps, reduce).taps.values()).backward()

    forward = student.flops(tokens, taps)
    found = counted(step).get_total_flops()
    # Backward is twice the forward, of weights and of inputs; the patch embedding needs none of its inputs, and the
    # part of attention behind a tap that ends the run is never made.
    stem = 2 * 16 * 3 * 8**2 * 32
    assert found == 3 * forward - stem


@pytest.mark.parametrize('patches, gflops, ratio', [(196, 35.13, 2.993), (67, 11.95, 2.981)])
def test_encoder_flops__of_a_vit_b_and_its_training_step(patches, gflops, ratio):
    with torch.device('meta'):
        student = MaskableVisionTransformer('base', img_size=224, patch_size=16)
    forward = student.flops([patches] * 12, {11: frozenset({'features'})})
    stem = 2 * 196 * 3 * 16**2 * 768
    assert forward / 1e9 == pytest.approx(gflops, abs=0.005)
    assert (3 * forward - stem) / forward == pytest.approx(ratio, abs=0.001)


def test_merge_taps__cost_no_more_than_the_deepest():
    student = build_student()
    merged = merge_taps(TAPS.values())
    assert student.flops([16] * 3, merged) == max(student.flops([16] * 3, taps) for taps in TAPS.values())


def test_encoder_flops__of_a_student_at_another_image_size(taps):
    student = build_student()
    expected = counted(lambda: student.encode(random(1, 3, 24, 40), taps)).get_total_flops()
    assert student.flops([15] * 3, taps, (3, 5)) == expected
