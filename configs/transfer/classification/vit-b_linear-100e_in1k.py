# Linear probe on IN-1K, frozen ViT-B/16 student: batch norm without affine and a linear layer, LARS, crops and flips
# alone, as in MAE. [choice]: mean patch token, 100 epochs, batch 4096. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/classification/vit-b_linear-100e_in1k.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
# Images: data/imagenet/{train,val}.
_base_ = [
    '../../_base_/models/linear_vit-base-p16.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../../_base_/schedules/linear_probe.py',
    '../../_base_/default_runtime.py',
]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=512,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(pipeline=train_pipeline))
