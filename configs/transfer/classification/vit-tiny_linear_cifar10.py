# Linear probe on a folder of CIFAR-10 images: the frozen ViT-Tiny/4 student of
# configs/hdistill/vit-tiny_deit-mae_cifar10.py. [choice] throughout.
#
#   python tools/train.py configs/transfer/classification/vit-tiny_linear_cifar10.py
#
# Other checkpoints, students and classes as in vit-tiny_ft_cifar10.py; another width is model.neck.1.input_features
# too, another depth model.backbone.frozen_stages.
_base_ = [
    '../../_base_/models/linear_vit-base-p16.py',
    '../../_base_/datasets/cifar10_labels.py',
    '../../_base_/schedules/linear_probe.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        arch='deit-tiny',
        img_size=32,
        patch_size=4,
        init_cfg=dict(checkpoint='mmhdistill:work_dirs/vit-tiny_deit-mae_cifar10/epoch_100.pth')),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=192)],
    head=dict(num_classes=10, in_channels=192))

# Small batches need no LARS.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=1, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=20)
auto_scale_lr = dict(base_batch_size=128)
