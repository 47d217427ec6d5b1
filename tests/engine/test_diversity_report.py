import json
import time
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from torch.utils.data import Dataset

import mmhdistill.engine  # noqa: F401
from mmhdistill.engine import DiversityReportHook
from mmhdistill.functional import attention_distance, attention_from_qk, attention_nmi, effective_rank, linear_cka
from tests.helpers import tiny_distiller, tiny_student, tiny_teacher

HOOK = dict(type='mmhdistill.DiversityReportHook', interval=2, num_images=3)


class Images(Dataset):
    """Images are random anew at each access, as augmented ones are."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8))


def make_runner(folder, hooks, name='run', model=None, epochs=1, resume=False):
    return Runner(
        model=model or tiny_distiller(teachers=dict(clip=tiny_teacher(), mae=tiny_teacher())),
        work_dir=str(folder / name),
        resume=resume,
        train_dataloader=dict(
            batch_size=2, dataset=Images(), sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-1)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        custom_hooks=hooks,
        default_scope='mmpretrain',
        visualizer=dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
        log_level='WARNING',
        randomness=dict(seed=0),
        experiment_name=f'{folder.name}-{name}-{epochs}')


def reports(runner):
    lines = Path(runner.log_dir, 'vis_data/scalars.json').read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry for entry in entries if 'diversity/nmi/layer_0' in entry]


def test_report__comes_at_the_start_and_at_the_interval(tmp_path):
    runner = make_runner(tmp_path, [HOOK])
    runner.train()
    assert [entry['step'] for entry in reports(runner)] == [0, 2, 4]


def test_report__is_what_the_functions_say(tmp_path):
    """Distances in pixels of the student's images, also of a teacher of smaller patches, which sees smaller ones."""
    runner = make_runner(tmp_path, [HOOK], model=tiny_distiller(teachers=dict(
        clip=tiny_teacher(patch_size=4, img_size=16), mae=tiny_teacher())))
    runner.train()
    entry = reports(runner)[-1]
    model, hook = runner.model, next(hook for hook in runner.hooks if isinstance(hook, DiversityReportHook))
    images = hook._images
    assert images.shape == (3, 3, 32, 32)
    everything = {layer: frozenset({'q', 'k', 'hidden'}) for layer in range(3)}
    model.backbone.eval()
    with torch.no_grad():
        student = model.backbone.encode(images, everything)
        teachers = {name: teacher(images, (4, 4), everything) for name, teacher in model.teachers.items()}
    for suffix, output in (('', student), ('_clip', teachers['clip']), ('_mae', teachers['mae'])):
        for layer in range(3):
            attention = attention_from_qk(output.taps[layer, 'q'], output.taps[layer, 'k'], 4, 1)
            hidden = output.taps[layer, 'hidden'][:, 1:].reshape(48, -1)
            want = dict(nmi=attention_nmi(attention).mean(), rank=effective_rank(hidden),
                        distance=attention_distance(attention, (4, 4), 8).mean())
            for kind, value in want.items():
                assert entry[f'diversity/{kind}{suffix}/layer_{layer}'] == pytest.approx(value.item(), rel=1e-5)
    for name, output in teachers.items():
        for layer in range(3):
            ours, theirs = (x.taps[layer, 'hidden'][:, 1:].reshape(48, -1) for x in (student, output))
            want = linear_cka(ours, theirs).item()
            assert entry[f'diversity/cka_{name}/layer_{layer}'] == pytest.approx(want, rel=1e-5)
    # Teachers stay as they are, the student does not.
    first = reports(runner)[0]
    assert first['diversity/nmi_mae/layer_1'] == entry['diversity/nmi_mae/layer_1']
    assert first['diversity/nmi/layer_1'] != entry['diversity/nmi/layer_1']


def test_report__changes_nothing_in_training(tmp_path):
    model = tiny_distiller(backbone=tiny_student(drop_path_rate=0.5))
    weights = []
    for name, hooks in (('with', [HOOK]), ('without', [])):
        runner = make_runner(tmp_path, hooks, name, model)
        runner.train()
        assert runner.model.backbone.training
        weights.append(runner.model.state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_report__of_a_resumed_run_has_the_same_images(tmp_path):
    images = []
    for epochs, resume in ((1, False), (2, True)):
        runner = make_runner(tmp_path, [HOOK], epochs=epochs, resume=resume)
        runner.train()
        images.append(next(hook for hook in runner.hooks if isinstance(hook, DiversityReportHook))._images)
    assert torch.equal(*images)


def test_report__of_another_model_is_refused(tmp_path):
    model = dict(type='mmpretrain.ImageClassifier', backbone=dict(tiny_student(), out_type='cls_token'),
                 head=dict(type='mmpretrain.LinearClsHead', num_classes=2, in_channels=32))
    with pytest.raises(ValueError, match='the model is a ImageClassifier: leave the hook out'):
        make_runner(tmp_path, [HOOK], model=model).train()


@pytest.mark.parametrize('args', [dict(interval=0), dict(num_images=0)])
def test_bad_arguments__are_told(args):
    with pytest.raises(ValueError, match='give at least 1 of both'):
        DiversityReportHook(**args)


def test_overhead__at_the_default_interval_is_below_2_percent(tmp_path):
    """Of steps of the smallest useful batch, 8 images: larger ones only lower the share."""
    runner = make_runner(tmp_path, [dict(type='mmhdistill.DiversityReportHook', interval=1)])
    runner.train()
    hook = next(hook for hook in runner.hooks if isinstance(hook, DiversityReportHook))
    images = hook._images

    def seconds(function):
        begin = time.process_time()
        function()
        return time.process_time() - begin

    def step():
        losses = runner.model.loss(images)
        sum(losses.values()).backward()

    report = min(seconds(lambda: hook._report(runner, 1)) for _ in range(5))
    assert report <= 0.02 * DiversityReportHook().interval * min(seconds(step) for _ in range(5))
