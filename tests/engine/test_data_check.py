import pytest
import torch
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

import mmhdistill.engine  # noqa: F401
from mmhdistill.engine import DataCheck
from tests.helpers import tiny_student

NAMES = ['cat', 'dog', 'bird']


class Images(Dataset):

    def __init__(self, classes=NAMES, size=32, cat_ids=None):
        self.metainfo = {} if classes is None else dict(classes=classes)
        self.size = size
        if cat_ids is not None:
            self.cat_ids, self.ann_file = cat_ids, 'instances.json'

    def __len__(self):
        return 2

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample
        return dict(inputs=torch.zeros(3, *self.size) if isinstance(self.size, tuple)
                    else torch.zeros(3, self.size, self.size), data_samples=DataSample().set_gt_label(index))


class Wrapped(Images):
    """As mmdet's data sets of data sets are."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset


def loader(dataset):
    return dict(batch_size=2, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='default_collate'))


def run(folder, train=None, val=None, test=None, num_classes=3, load_from=None, name='run'):
    model = dict(type='ImageClassifier',
                 backbone=dict(tiny_student(), out_type='cls_token'),
                 head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=32,
                           loss=dict(type='CrossEntropyLoss')))
    cfg = dict(model=model, default_scope='mmpretrain', work_dir=str(folder / name), log_level='WARNING',
               experiment_name=f'{folder.name}-{name}', custom_hooks=[dict(type='mmhdistill.DataCheck')],
               load_from=load_from)
    if train is not None:
        cfg.update(train_dataloader=loader(train), train_cfg=dict(by_epoch=True, max_epochs=1),
                   optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))
    for split, dataset in dict(val=val, test=test).items():
        if dataset is not None:
            cfg.update({f'{split}_dataloader': loader(dataset), f'{split}_cfg': dict(),
                        f'{split}_evaluator': dict(type='Accuracy')})
    return Runner(**cfg)


def refused(runner, message):
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert runner.iter == 0


def test_fitting_data__train_validate_and_are_tested(tmp_path):
    runner = run(tmp_path, Images(), Images(tuple(NAMES)))
    runner.train()
    assert runner.iter == 1
    metrics = run(tmp_path, test=Images(), load_from=str(tmp_path / 'run/epoch_1.pth'), name='test').test()
    assert metrics['accuracy/top1'] in (0.0, 50.0, 100.0)


@pytest.mark.parametrize('train, val, message', [
    (None, NAMES, r'train_dataloader.dataset \(Images\) names no classes: give it metainfo'),
    ([], NAMES, r'train_dataloader.dataset \(Images\) names no classes'),
    (NAMES, None, r'val_dataloader.dataset \(Images\) names no classes'),
    (NAMES[:2], NAMES[:2], r'model.head \(LinearClsHead\) has num_classes=3, and the data 2 classes \(cat, dog\)'),
    (NAMES, NAMES[:2], r'the 2 classes of val_dataloader are not the 3 of train: it lacks bird and has none beside'),
    (NAMES, ['cat', 'dog', 'cow'], r'it lacks bird and has cow beside'),
    (NAMES, ['dog', 'cat', 'bird'], r'the same in another order, dog, cat, bird and not cat, dog, bird'),
])
def test_classes__that_do_not_fit_are_refused_before_the_first_step(tmp_path, train, val, message):
    refused(run(tmp_path, Images(train), Images(val)), message)


def test_test__on_other_classes_than_the_checkpoint_learnt_is_refused(tmp_path):
    run(tmp_path, Images()).train()
    path = str(tmp_path / 'run/epoch_1.pth')
    other = run(tmp_path, test=Images(['cat', 'dog', 'cow']), load_from=path, name='test')
    with pytest.raises(ValueError, match='test_dataloader are not the 3 of the checkpoint: it lacks bird and has cow'):
        other.test()
    # Another task may start from it.
    run(tmp_path, Images(['a', 'b', 'c']), load_from=path, name='more').train()


def test_test__without_a_head_takes_any_classes():
    """As k-NN does."""
    check, runner = DataCheck(), type('Runner', (), {})()
    check.after_load_checkpoint(runner, dict(meta=dict(dataset_meta=dict(classes=NAMES))))
    runner.test_dataloader = type('Loader', (), dict(dataset=Images(['a', 'b'])))
    runner.model = nn.Linear(1, 1)
    check.before_test(runner)
    runner.model = nn.Sequential(nn.Linear(1, 1))
    runner.model[0].num_classes = 2
    with pytest.raises(ValueError, match='the 2 classes of test_dataloader are not the 3 of the checkpoint'):
        check.before_test(runner)


@pytest.mark.parametrize('wrap', [lambda x: x, Wrapped, lambda x: Wrapped(Wrapped(x))])
def test_annotation_file__that_lacks_a_category_is_refused(tmp_path, wrap):
    refused(run(tmp_path, wrap(Images(cat_ids=[1, 3]))), r'instances.json has 2 of the 3 classes')
    run(tmp_path, wrap(Images(cat_ids=[1, 3, 4])), name='whole').train()


def test_annotation_file__in_a_concatenation_is_found(tmp_path):
    both = ConcatDataset([Images(), Images(cat_ids=[1])])
    both.metainfo = dict(classes=NAMES)
    refused(run(tmp_path, both), r'instances.json has 1 of the 3 classes')


@pytest.mark.parametrize('size', [4, (4, 32), (32, 7)])
@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_images__smaller_than_a_patch_are_refused(tmp_path, size, split):
    """mmpretrain's ViT fills them up to one."""
    sets = dict(train=Images()) if split == 'val' else {}
    runner = run(tmp_path, **{**sets, split: Images(size=size)})
    shape = f'{size}x{size}' if isinstance(size, int) else f'{size[0]}x{size[1]}'
    message = rf'image of {split}_dataloader has {shape} pixels, less than one patch of backbone \(8x8\)'
    with pytest.raises(ValueError, match=message):
        runner.test() if split == 'test' else runner.train()
    assert split != 'train' or runner.iter == 0


def test_region_proposals__have_a_class_of_their_own():
    check, runner = DataCheck(), type('Runner', (), {})()
    box_head = nn.Linear(1, 1)
    runner.model = nn.ModuleDict(dict(rpn_head=nn.Linear(1, 1), roi_head=nn.ModuleDict(dict(bbox_head=box_head))))
    runner.model['rpn_head'].num_classes, box_head.num_classes = 1, 3
    runner.train_dataloader, runner.val_loop = type('Loader', (), dict(dataset=Images())), None
    check.before_train(runner)
    box_head.num_classes = 1
    with pytest.raises(ValueError, match=r'model.roi_head.bbox_head \(Linear\) has num_classes=1'):
        check.before_train(runner)
