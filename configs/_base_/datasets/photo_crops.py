# quickstart/data/{train,test}/CLASS/*.png: grey 32-px crops of photographs, written by tools/quickstart.sh.
train_pipeline = [
    dict(type='mmhdistill.LoadImage'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='mmhdistill.LoadImage'), dict(type='PackInputs', meta_keys=('img_path', 'split'))]

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmhdistill.ImageFolder', data_root='quickstart/data/train', with_label=True, pipeline=train_pipeline))

# k-NN of a distilled student: test crops are of the unseen right part of each photograph.
test_dataloader = dict(
    batch_size=256,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(
                type='mmhdistill.ImageFolder', data_root='quickstart/data/train', with_label=True, split='bank',
                pipeline=test_pipeline),
            dict(
                type='mmhdistill.ImageFolder', data_root='quickstart/data/test', with_label=True, split='query',
                pipeline=test_pipeline),
        ]))
test_cfg = dict()
test_evaluator = dict(type='mmhdistill.KNNMetric')
