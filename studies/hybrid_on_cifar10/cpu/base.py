# What all runs of the study share at this size: CIFAR-10 (data/cifar10/{train,test}/CLASS/*.jpg), every fifth image to
# train with and all to test with, and a small ViT of 32 px and patch 4 for teachers and students alike.
_base_ = ['mmhdistill::_base_/schedules/quickstart.py', 'mmhdistill::_base_/quickstart_runtime.py']

arch = dict(embed_dims=64, num_layers=6, num_heads=4, feedforward_channels=256)
mean, std = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=32, crop_ratio_range=(0.4, 1.0), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs', meta_keys=('img_path', 'split'))]

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmhdistill.ImageFolder',
        data_root='data/cifar10/train',
        with_label=True,
        stride=5,
        pipeline=train_pipeline))
