import json

import pytest
import torch
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

import mmhdistill.engine  # noqa: F401
from mmhdistill.engine import DataCheck
from tests.helpers import log_messages, tiny_student

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
    (NAMES[:2], NAMES[:2],
     r'data have 2 classes \(cat, dog\), and the model has model.head.num_classes=3: set each to 2'),
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


def bare_runner(model, train=None, test=None):
    """The three things that the checks of classes read of a Runner."""
    loaders = [type('Loader', (), dict(dataset=dataset)) for dataset in (train, test)]
    return type('Runner', (), dict(model=model, train_dataloader=loaders[0], test_dataloader=loaders[1], val_loop=None))


def heads(**numbers):
    """Modules of these names and numbers of classes, ``__`` for the dots."""
    model = nn.Module()
    for name, number in numbers.items():
        owner = model
        for part in name.split('__'):
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.num_classes = number
    return model


def test_test__without_a_head_takes_any_classes():
    """As k-NN does."""
    check, dataset = DataCheck(), Images(['a', 'b'])
    check.after_load_checkpoint(None, dict(meta=dict(dataset_meta=dict(classes=NAMES))))
    check.before_test(bare_runner(nn.Linear(1, 1), test=dataset))
    check.before_test(bare_runner(heads(data_preprocessor=7), test=dataset))
    with pytest.raises(ValueError, match='the 2 classes of test_dataloader are not the 3 of the checkpoint'):
        check.before_test(bare_runner(heads(head=2), test=dataset))


def test_classes__every_number_that_does_not_fit_is_told_at_once():
    model = heads(head=5, head__loss_module=6, data_preprocessor=7)
    with pytest.raises(ValueError, match=r'has model.head.num_classes=5, model.head.loss.num_classes=6, '
                                         r'model.data_preprocessor.num_classes=7: set each to 3'):
        DataCheck().before_train(bare_runner(model, Images()))


@pytest.mark.parametrize('model, told', [
    (dict(roi_head__bbox_head=3, roi_head__mask_head=3, roi_head__semantic_head=183, rpn_head=1), None),
    (dict(roi_head__bbox_head=3, roi_head__mask_head=80), 'model.roi_head.mask_head.num_classes=80'),
    (dict(roi_head__bbox_head__0=3, roi_head__bbox_head__1=80), 'model.roi_head.bbox_head.1.num_classes=80'),
    (dict(bbox_head=80), 'model.bbox_head.num_classes=80'),
    (dict(decode_head=3, auxiliary_head=2), None),
    (dict(decode_head=150), 'model.decode_head.num_classes=150'),
    (dict(reid__head=380, detector__bbox_head=9), None),
])
def test_classes__of_detectors_and_segmentors(model, told):
    """Auxiliary and semantic heads, region proposals and re-identification may have classes of their own."""
    runner = bare_runner(heads(**model), Images())
    if told is None:
        DataCheck().before_train(runner)
        return
    with pytest.raises(ValueError, match=f'the model has {told}: set each to 3'):
        DataCheck().before_train(runner)


def test_classes__of_a_panoptic_data_set_are_things_or_all():
    dataset = Images([*NAMES, 'sky'])
    dataset.metainfo.update(thing_classes=NAMES, stuff_classes=['sky'])
    DataCheck().before_train(bare_runner(heads(roi_head__bbox_head=3, bbox_head=4), dataset))
    with pytest.raises(ValueError, match='num_classes=2'):
        DataCheck().before_train(bare_runner(heads(roi_head__bbox_head=2), dataset))


def test_classes__a_stand_alone_rpn_has_one():
    from mmdet.models import RPNHead
    model = nn.ModuleDict(dict(bbox_head=RPNHead(in_channels=4, feat_channels=4)))
    DataCheck().before_train(bare_runner(model, Images()))


def coco(folder, names, classes):
    """A data set of mmdet on a file that lists its categories in this order."""
    from mmdet.datasets import CocoDataset
    file = folder / 'instances.json'
    file.write_text(json.dumps(dict(
        images=[dict(id=1, file_name='1.jpg', width=32, height=32)],
        annotations=[dict(id=1, image_id=1, category_id=0, bbox=[0, 0, 9, 9], area=81, iscrowd=0)],
        categories=[dict(id=index, name=name) for index, name in enumerate(names)])))
    return CocoDataset(ann_file=str(file), data_prefix=dict(img=''), metainfo=dict(classes=classes),
                       pipeline=[])


@pytest.mark.parametrize('wrap', [lambda x: x, Wrapped, lambda x: Wrapped(Wrapped(x))])
@pytest.mark.parametrize('names, message', [
    (['cat', 'bird'], r'has 2 of the 3 classes of .*, cat, dog, bird, and lacks dog'),
    (['dog', 'cat', 'bird'], r'has 3 of the 3 classes of .*, cat, dog, bird, and numbers them dog, cat, bird'),
    (['cat', 'dog', 'bird'], None),
    (['cow', 'cat', 'dog', 'pig', 'bird'], None),
])
def test_annotation_file__numbers_labels_by_its_own_order(tmp_path, wrap, names, message):
    dataset = coco(tmp_path, names, NAMES)
    # What the check is about: the label of the first category.
    first = dataset.cat2label.get(0)
    assert first == (0 if names[0] in NAMES else None)
    runner = bare_runner(heads(bbox_head=3), wrap(dataset))
    if message is None:
        DataCheck().before_train(runner)
        return
    with pytest.raises(ValueError, match=f'instances.json {message}'):
        DataCheck().before_train(runner)


def test_annotation_file__that_is_not_at_hand(tmp_path):
    refused(run(tmp_path, Images(cat_ids=[1, 3])), r'instances.json has 2 of the 3 classes .* and lacks some')


def test_concatenation__has_the_same_classes_in_every_part(tmp_path):
    both = ConcatDataset([Images(), Images(cat_ids=[1])])
    both.metainfo = dict(classes=NAMES)
    refused(run(tmp_path, both), r'instances.json has 1 of the 3 classes')
    # mmdet's has a list where its parts differ, in a palette for example.
    both = ConcatDataset([Images(), Images()])
    both.metainfo = [part.metainfo for part in both.datasets]
    DataCheck().before_train(bare_runner(heads(bbox_head=3), both))
    DataCheck().after_load_checkpoint(None, dict(meta=dict(dataset_meta=both.metainfo)))
    both = ConcatDataset([Images(), Images(['cat', 'dog', 'cow'])])
    both.metainfo = [part.metainfo for part in both.datasets]
    with pytest.raises(ValueError, match='of train_dataloader are not the 3 of its first part.*it lacks bird'):
        DataCheck().before_train(bare_runner(heads(bbox_head=3), both))


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


def test_images__in_any_batch_and_nesting():
    from mmhdistill.models import MaskableVisionTransformer
    cfg = tiny_student()
    cfg.pop('type')
    runner, check = bare_runner(MaskableVisionTransformer(**cfg)), DataCheck()
    good, bad = torch.zeros(3, 8, 9), torch.zeros(3, 8, 7)
    for inputs in (good, [good, good], dict(sup=[good], unsup=[[good], (good, )]), None):
        check.before_train_iter(runner, 5, dict(inputs=inputs))
    for inputs in (bad, [good, bad], dict(sup=[good], unsup=[[good], (bad, )])):
        with pytest.raises(ValueError, match='8x7 pixels, less than one patch'):
            check.before_train_iter(runner, 5, dict(inputs=inputs))


def test_start__of_other_normalisation_and_layers_frozen_in_part_are_told(tmp_path):
    runner = run(tmp_path, Images(size=32))
    vit = runner.model.backbone
    vit.started_from = dict(file='epoch_9.pth', data_preprocessor=dict(mean=[120, 120, 120], std=[60, 60, 60]))
    vit.frozen_stages = 2
    runner.model.data_preprocessor.register_buffer('mean', torch.full((3, 1, 1), 123.5), False)
    runner.model.data_preprocessor.register_buffer('std', torch.full((3, 1, 1), 60.0), False)
    with log_messages() as log:
        DataCheck().before_train(runner)
    assert len(log) == 2
    assert log[0].startswith('model.backbone: 2 of 3 layers are frozen')
    assert 'epoch_9.pth, whose images had mean [120, 120, 120]; here they have [123.5, 123.5, 123.5]' in log[1]
    vit.frozen_stages = 3
    runner.model.data_preprocessor.mean.fill_(120)
    with log_messages() as log:
        DataCheck().before_train(runner)
    assert log == []
