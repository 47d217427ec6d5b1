# data/imagenet/{train,val}/CLASS/*.JPEG; for any other folder of images set the data_root of the three data sets.
train_pipeline = [
    dict(type='mmhdistill.LoadImage'),
    dict(
        type='RandomResizedCrop', scale=224, crop_ratio_range=(0.2, 1.0), backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='mmhdistill.LoadImage'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs', meta_keys=('img_path', 'split')),
]

train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='mmhdistill.ImageFolder', data_root='data/imagenet/train', pipeline=train_pipeline))

# k-NN: every tenth training image is enough of a bank.
test_dataloader = dict(
    batch_size=256,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(
                type='mmhdistill.ImageFolder',
                data_root='data/imagenet/train',
                with_label=True,
                split='bank',
                stride=10,
                pipeline=test_pipeline),
            dict(
                type='mmhdistill.ImageFolder',
                data_root='data/imagenet/val',
                with_label=True,
                split='query',
                pipeline=test_pipeline),
        ]))
test_cfg = dict()
test_evaluator = dict(type='mmhdistill.KNNMetric')
