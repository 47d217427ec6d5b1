# Fine-tuning on CIFAR-100 at 224 px, ViT-B/16 student: IN-1K's recipe with other data [choice].
# Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/classification/vit-b_ft-100e_cifar100.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
# Images: data/cifar100, fetched if they are not there.
_base_ = './vit-b_ft-100e_in1k.py'

model = dict(head=dict(num_classes=100, loss=dict(num_classes=100)))
# mmpretrain.CIFAR100 gives RGB images, and no files to load.
data_preprocessor = dict(num_classes=100, to_rgb=False)
train_pipeline = [
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[124, 116, 104], interpolation='bicubic')),
    dict(
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=[123.675, 116.28, 103.53],
        fill_std=[58.395, 57.12, 57.375]),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='Resize', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True, type='CIFAR100', data_root='data/cifar100', split='train', pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(_delete_=True, type='CIFAR100', data_root='data/cifar100', split='test', pipeline=test_pipeline))
test_dataloader = dict(
    dataset=dict(_delete_=True, type='CIFAR100', data_root='data/cifar100', split='test', pipeline=test_pipeline))
