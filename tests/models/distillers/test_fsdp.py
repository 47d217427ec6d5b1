"""Sharded by mmengine's FSDP strategy, a distiller trains as it does under DDP, and its checkpoint is whole."""
import os

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner
from mmpretrain.registry import MODELS as MMPRETRAIN
from torch.utils.data import Dataset

import mmhdistill  # noqa: F401  (its cures, in the processes too)
from tests.helpers import spawn, tiny_distiller

pytestmark = pytest.mark.slow

FULL = dict(offload_to_cpu=False, rank0_only=False)  # Offloading to where they are crashes on a CPU.
STRATEGIES = dict(
    ddp=dict(type='DDPStrategy', model_wrapper=dict(type='MMDistributedDataParallel', device_ids=None)),
    fsdp=dict(
        type='FSDPStrategy',
        # Some of the student's tensors are frozen.
        model_wrapper=dict(use_orig_params=True, device_id=torch.device('cpu')),
        state_dict_cfg=dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', **FULL),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', **FULL))))
RELATION = dict(type='mmhdistill.TokenRelationLoss', teacher='mae')
MODELS = dict(both=tiny_distiller(), relation_only=tiny_distiller(losses=dict(relation=RELATION)))


class Losses(Hook):
    """Of each step of this process."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(outputs['loss'].item())


class Images(Dataset):
    metainfo = {}

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8))


def work(rank, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    for model in MODELS:
        for name, strategy in STRATEGIES.items():
            losses = Losses()
            FlexibleRunner(
                model=MODELS[model], work_dir=str(folder / model / name), strategy=strategy,
                train_dataloader=dict(
                    batch_size=4, dataset=Images(), sampler=dict(type='DefaultSampler', shuffle=False),
                    collate_fn=dict(type='default_collate')),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
                train_cfg=dict(by_epoch=True, max_epochs=2),
                custom_hooks=[losses], log_level='ERROR', randomness=dict(seed=0), default_scope='mmpretrain',
                experiment_name=f'{model}-{name}').train()
            torch.save(losses.seen, folder / model / name / f'losses-{rank}.pth')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('strategies')
    spawn(work, folder, folder)
    return folder


@pytest.mark.parametrize('model', MODELS)
def test_fsdp__losses_and_weights_of_ddp(model, folder):
    losses, checkpoints = {}, {}
    for name in STRATEGIES:
        losses[name] = [torch.load(folder / model / name / f'losses-{rank}.pth') for rank in range(2)]
        weights = torch.load(folder / model / name / 'epoch_2.pth', weights_only=False)['state_dict']
        # This runner leaves DDP's prefix there.
        checkpoints[name] = {key.removeprefix('module.'): x for key, x in weights.items()}
    for ddp, fsdp in zip(losses['ddp'], losses['fsdp']):
        assert len(ddp) == 4
        # The third step sees the images of the first.
        assert ddp[2] < 0.99 * ddp[0]
        assert fsdp == pytest.approx(ddp, rel=1e-5)
    assert losses['ddp'][0] != losses['ddp'][1]
    assert checkpoints['fsdp'].keys() == checkpoints['ddp'].keys()
    for key, tensor in checkpoints['ddp'].items():
        torch.testing.assert_close(checkpoints['fsdp'][key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('model', MODELS)
def test_fsdp__checkpoint_is_a_whole_student(model, folder):
    arch = MODELS[model]['backbone']['arch']
    vit = MMPRETRAIN.build(dict(type='VisionTransformer', arch=arch, img_size=32, patch_size=8))
    weights = torch.load(folder / model / 'fsdp/epoch_2.pth', weights_only=False)['state_dict']
    student = {key.removeprefix('backbone.'): x for key, x in weights.items() if key.startswith('backbone.')}
    vit.load_state_dict(student, strict=True)
