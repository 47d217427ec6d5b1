"""The hooks that report, in two processes."""
import json
import os

import pytest
import torch
from mmengine.runner import Runner

import mmhdistill.engine  # noqa: F401
from tests.engine.test_knn_evaluation import Images
from tests.helpers import spawn, tiny_distiller


def work(rank, folder):
    os.environ['LOCAL_RANK'] = str(rank)  # as a launcher does
    loader = dict(batch_size=3, num_workers=0, dataset=Images(), collate_fn=dict(type='pseudo_collate'),
                  sampler=dict(type='DefaultSampler', shuffle=False))
    runner = Runner(
        model=tiny_distiller(), work_dir=str(folder), launcher='pytorch',
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', broadcast_buffers=False,
                                        find_unused_parameters=False, device_ids=None)),
        train_dataloader=loader, train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
        test_dataloader=loader, test_cfg=dict(), test_evaluator=dict(type='mmhdistill.KNNMetric', k=5),
        custom_hooks=[dict(type='mmhdistill.DiversityReportHook', interval=2, num_images=3),
                      dict(type='mmhdistill.KNNEvaluationHook', interval=1)],
        default_scope='mmpretrain', log_level='WARNING', randomness=dict(seed=0), experiment_name='two',
        visualizer=dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]))
    runner.train()
    torch.save(runner.model.module.backbone.state_dict(), folder / f'{rank}.pth')


@pytest.mark.slow
def test_reports__of_two_processes(tmp_path):
    spawn(work, tmp_path, tmp_path)
    file, = tmp_path.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    # 30 images, 3 of each process a step: 5 steps.
    assert [entry['step'] for entry in entries if 'diversity/nmi/layer_0' in entry] == [0, 2, 4]
    knn = [entry for entry in entries if 'knn/patch' in entry]
    assert [entry['step'] for entry in knn] == [0, 5]
    assert {name for name in knn[0] if name.startswith('knn/')} == {'knn/patch', 'knn/cls', 'knn/clip', 'knn/mae'}
    # Six queries, whichever process saw them.
    assert all(value * 6 / 100 == pytest.approx(round(value * 6 / 100))
               for name, value in knn[1].items() if name.startswith('knn/'))
    one, two = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
