"""Two processes see what one process with twice the batch sees."""
import pytest
import torch
from mmengine.model import MMDistributedDataParallel

from tests.helpers import build_distiller, random_images, spawn

FEATURE = dict(type='mmhdistill.FeatureLoss', teacher='clip')
RELATION = dict(type='mmhdistill.TokenRelationLoss', teacher='mae', kinds=['qk', 'vv'])
SCORER = dict(type='mmhdistill.SimilarityScorer')
INPUT = dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.8, teacher='mae', scorer=SCORER)
ENCODER = dict(type='mmhdistill.ProgressiveTokenMasker', place='encoder', keep_rate=0.6, scorer=SCORER)
SETTINGS = dict(
    input=dict(losses=dict(feature=FEATURE, relation=RELATION), masker=INPUT),
    encoder=dict(losses=dict(feature=FEATURE, relation=RELATION), masker=ENCODER),
    relation_only=dict(losses=dict(relation=RELATION), masker=INPUT),
    relation_only_encoder=dict(losses=dict(relation=RELATION), masker=ENCODER),
    feature_only=dict(losses=dict(feature=FEATURE), masker=ENCODER))
BATCH, STEPS = 3, 2

pytestmark = pytest.mark.slow


def run(model, batches):
    """Losses and gradients of each step of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    history = []
    for images in batches:
        optimizer.zero_grad()
        losses = model(images, mode='loss')
        sum(losses.values()).backward()
        gradients = {name.removeprefix('module.'): p.grad.clone() for name, p in model.named_parameters()
                     if p.requires_grad}
        history.append(({name: loss.item() for name, loss in losses.items()}, gradients))
        optimizer.step()
    return history


def work(rank, folder):
    for name, setting in SETTINGS.items():
        # Every process starts from other weights; DDP spreads those of the first.
        model = build_distiller(**setting)
        if rank:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        model = MMDistributedDataParallel(model, find_unused_parameters=False)
        names = [name for name, _ in model.named_parameters()]
        assert [name for name in names if 'teacher' in name] == []
        batches = [random_images(2 * BATCH, seed=step)[rank * BATCH:][:BATCH] for step in range(STEPS)]
        torch.save(run(model, batches), folder / f'{name}-{rank}.pth')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    spawn(work, folder, folder)
    return folder


@pytest.mark.parametrize('name', SETTINGS)
def test_two_processes__equal_one_with_twice_the_batch(name, folder):
    ranks = [torch.load(folder / f'{name}-{rank}.pth') for rank in range(2)]
    single = run(build_distiller(**SETTINGS[name]), [random_images(2 * BATCH, seed=step) for step in range(STEPS)])
    assert len(single) == len(ranks[0]) == STEPS
    for (losses, gradients), *others in zip(single, *ranks):
        assert set(losses) == {f'loss/{loss}' for loss in SETTINGS[name]['losses']}
        for loss, value in losses.items():
            assert sum(other[0][loss] for other in others) / 2 == pytest.approx(value, rel=1e-5)
            # The two halves of the batch do differ.
            assert others[0][0][loss] != pytest.approx(others[1][0][loss], rel=1e-3)
        for _, found in others:
            assert set(found) == set(gradients)
            for parameter, expected in gradients.items():
                assert expected.norm() > 0
                assert (found[parameter] - expected).norm() <= 1e-5 * expected.norm(), parameter
