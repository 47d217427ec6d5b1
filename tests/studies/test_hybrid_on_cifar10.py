"""The study's grids: every cell is the method that its name says, and learns."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmhdistill.analysis.ablation import plan
from mmhdistill.models.heads.mask_decoder import MaskDecoder
from mmhdistill.registry import MODELS

STUDY = Path(__file__).parents[2] / 'studies/hybrid_on_cifar10'
# Losses by teacher; place, keep rate, stages and scorer of the masker; what the student starts from.
INPUT, RANDOM = ('input', 0.7, 3, 'SimilarityScorer'), 'RandomScorer'
HYBRID = {'feature': 'supervised', 'relation': 'mae'}
CELLS = {
    'FD': ({'feature': 'supervised'}, None, None),
    'FD, 75 % masked': ({'feature': 'supervised'}, ('input', 0.25, 1, RANDOM), None),
    'FD of MoCo': ({'feature': 'moco'}, None, None),
    'relations': ({'relation': 'mae'}, None, None),
    'MFR, depth 1': ({'reconstruction': 'supervised'}, ('input', 0.25, 1, RANDOM), None),
    'MFR, depth 8': ({'reconstruction': 'supervised'}, ('input', 0.25, 1, RANDOM), None),
    'Hybrid, no mask': (HYBRID, None, None),
    'Hybrid of MoCo, no mask': ({'feature': 'moco', 'relation': 'mae'}, None, None),
    'Hybrid, input mask': (HYBRID, INPUT, None),
    'Hybrid, one stage': (HYBRID, ('input', 0.343, 1, 'SimilarityScorer'), None),
    'Hybrid, encoder mask': (HYBRID, ('encoder', 0.7, 3, 'SimilarityScorer'), None),
    'Hybrid, random mask': (HYBRID, ('input', 0.7, 3, RANDOM), None),
    'MOMA, MoCo to MAE': ({'feature': 'moco'}, ('input', 0.1, 1, RANDOM), 'mae'),
    'MOMA, MAE to MoCo': ({'feature': 'mae'}, ('input', 0.1, 1, RANDOM), 'moco'),
    'MOMA, both': ({'feature': 'moco', 'relation': 'mae'}, ('input', 0.1, 1, RANDOM), None),
}


ARCH = {'cpu': dict(embed_dims=64, num_layers=6, num_heads=4, feedforward_channels=256),
        'gpu': dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768)}


def runs(size, grid, folder):
    return {run.cell: Config.fromstring(run.recipe, '.py') for run in plan(STUDY / size / f'{grid}.py', folder)
            if run.seed == 0}


def build(cfg):
    for teacher in cfg.model.teachers.values():
        teacher.checkpoint = None
    if cfg.model.backbone.get('init_from'):
        cfg.model.backbone.init_from.checkpoint = None
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        distiller = MODELS.build(cfg.model)
    distiller.init_weights()
    return distiller.train()


@pytest.mark.parametrize('size, seeds', [('cpu', (0, 1)), ('gpu', (0, 1, 2))])
def test_grid__has_every_method_with_all_seeds(size, seeds, tmp_path):
    planned = plan(STUDY / size / 'grid.py', tmp_path)
    assert [(run.cell, run.seed) for run in planned] == [(cell, seed) for cell in CELLS for seed in seeds]
    # And its seeds differ in the seed alone.
    for run in planned:
        beginning = planned[len(seeds) * list(CELLS).index(run.cell)]
        cfg, first = (Config.fromstring(each.recipe, '.py').to_dict() for each in (run, beginning))
        assert cfg.pop('randomness')['seed'] == run.seed and first.pop('randomness')
        assert cfg == first


@pytest.mark.parametrize('size', ARCH)
@pytest.mark.parametrize('cell', CELLS)
def test_cell__is_the_method_of_its_name_and_learns(size, cell, tmp_path):
    cfg = runs(size, 'grid', tmp_path)[cell]
    losses, masking, start = CELLS[cell]
    distiller = build(cfg)
    assert distiller._reads == losses
    masker = distiller.masker
    assert masking == (masker and (masker.place, masker.keep_rate, masker.num_stages, type(masker.scorer).__name__))
    init_from = cfg.model.backbone.get('init_from')
    assert start == (init_from and init_from.card.name)
    if cell.startswith('MFR'):
        decoder, = (module for module in distiller.modules() if isinstance(module, MaskDecoder))
        assert len(decoder.layers) == int(cell[-1])
    found = distiller.loss(torch.randn(2, 3, 32, 32))
    assert set(found) == {f'loss/{name}' for name in losses}
    sum(found.values()).backward()
    for name, p in distiller.backbone.named_parameters():
        # A norm that no loss reads is frozen.
        assert not p.requires_grad or p.grad is not None and torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize('size', ARCH)
def test_sweep__weights_and_distances_without_the_cell_of_the_grid(size, tmp_path):
    found = {cell: (cfg.model.losses.relation.get('distance', 'kl'), cfg.model.losses.relation.loss_weight)
             for cell, cfg in runs(size, 'sweep', tmp_path).items()}
    assert found == {f'{distance} {weight}': (distance, weight) for distance in ('kl', 'smooth_l1')
                     for weight in (0.1, 0.3, 1.0) if (distance, weight) != ('kl', 0.3)}
    hybrid = runs(size, 'grid', tmp_path)['Hybrid, input mask'].model.losses.relation
    assert (hybrid.get('distance', 'kl'), hybrid.loss_weight) == ('kl', 0.3)


@pytest.mark.parametrize('size, stride, compared', [('cpu', 5, [10, 10]), ('gpu', 1, [1, 1])])
def test_configs__share_the_architecture_and_the_images(size, stride, compared):
    made = {}
    for name in ('supervised', 'moco', 'mae', 'hybrid', 'finetune'):
        cfg = Config.fromfile(STUDY / size / f'{name}.py')
        assert cfg.model.backbone.arch == ARCH[size]
        assert cfg.model.data_preprocessor.mean == [125.3, 123.0, 113.9]
        assert cfg.train_dataloader.dataset.data_root == 'data/cifar10/train'
        assert cfg.train_dataloader.dataset.stride == stride
        if name != 'hybrid':
            with DefaultScope.overwrite_default_scope('mmpretrain'):
                MODELS.build(cfg.model)
        made[name] = f'work_dirs/{name}/epoch_{cfg.train_cfg.max_epochs}.pth'
    for name in ('mae', 'moco'):
        longer = Config.fromfile(STUDY / size / f'{name}_longer.py')
        assert longer.load_from == made[name]
        assert longer.train_cfg.max_epochs == Config.fromfile(STUDY / size / 'hybrid.py').train_cfg.max_epochs
    bank, queries = Config.fromfile(STUDY / size / 'hybrid.py').test_dataloader.dataset.datasets
    assert (bank.data_root, queries.data_root) == ('data/cifar10/train', 'data/cifar10/test')
    assert [part.get('stride', 1) for part in (bank, queries)] == compared
    # What students read is what the teachers' recipes leave, and their card is right.
    for cfg in runs(size, 'grid', Path('nowhere')).values():
        arch = ARCH[size]
        for name, teacher in cfg.model.teachers.items():
            assert teacher.checkpoint == made[name]
            assert (teacher.card.embed_dims, teacher.card.depth, teacher.card.num_heads) == (
                arch['embed_dims'], arch['num_layers'], arch['num_heads'])
        if start := cfg.model.backbone.get('init_from'):
            assert start.checkpoint == made[start.card.name]
