# data/caltech101/{train,val}/CLASS/*.jpg; the rest as in cifar10_labels.py, at 64 px.
_base_ = './cifar10_labels.py'

data_preprocessor = dict(num_classes=100)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.3, 1.0), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=72, edge='short', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(data_root='data/caltech101/train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root='data/caltech101/val', pipeline=test_pipeline))
test_dataloader = val_dataloader
