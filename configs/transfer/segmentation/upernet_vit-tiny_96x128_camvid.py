# UperNet on CamVid at a quarter of its area: images of 240x180, crops of 128x96 (w x h), the ViT-Tiny/4 student of
# configs/hdistill/vit-tiny_deit-mae_cifar10.py. For one GPU, or, with a smaller student, for a CPU. [choice]
# throughout; a patch of 4 px needs no larger map than twice the patch grid, so that the pyramid's strides are 2 to 16.
# Needs the full mmcv.
#
#   python tools/train.py configs/transfer/segmentation/upernet_vit-tiny_96x128_camvid.py
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE; random weights:
# model.backbone.init_cfg=None. From the quick start's student, and from random weights for comparison:
#   python benchmarks/camvid_upernet.py CHECKPOINT data/camvid
_base_ = [
    'mmseg::_base_/models/upernet_mae.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]
custom_imports = dict(imports=['mmhdistill', 'mmpretrain.models'], allow_failed_imports=False)
runner_type = 'mmhdistill.ResumableRunner'
custom_hooks = [dict(type='mmhdistill.DataCheck')]

# One process.
norm = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(96, 128)),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='deit-tiny',
        img_size=(96, 128),
        patch_size=4,
        out_type='featmap',
        out_indices=(3, 5, 7, 11),
        init_cfg=dict(
            type='Pretrained', checkpoint='mmhdistill:work_dirs/vit-tiny_deit-mae_cifar10/epoch_100.pth')),
    neck=dict(embed_dim=192, rescales=[2, 1, 0.5, 0.25]),
    decode_head=dict(in_channels=[192] * 4, channels=64, num_classes=11, norm_cfg=norm),
    auxiliary_head=dict(in_channels=192, channels=64, num_classes=11, norm_cfg=norm),
    # Four crops of the trained size cover an image.
    test_cfg=dict(mode='slide', crop_size=(96, 128), stride=(84, 112)))

# data/camvid/{img_dir,ann_dir}/{train,val,test}: labels 0 to 10, 255 is ignored.
metainfo = dict(
    classes=('Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol', 'Fence', 'Car', 'Pedestrian',
             'Bicyclist'),
    palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
             [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]])
data = dict(
    type='BaseSegDataset', data_root='data/camvid', metainfo=metainfo, reduce_zero_label=False, ignore_index=255)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(240, 180), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(96, 128), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
# Labels are loaded at their own size, to which scores are enlarged.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(240, 180), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'), pipeline=train_pipeline, **data))
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='img_dir/val', seg_map_path='ann_dir/val'), pipeline=test_pipeline, **data))
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='img_dir/test', seg_map_path='ann_dir/test'), pipeline=test_pipeline, **data))
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    _delete_=True,
    type='mmhdistill.auto_amp_optim_wrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.75))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=100),
]
train_cfg = dict(max_iters=8000, val_interval=1000)
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=1))
randomness = dict(seed=0)
