# Hybrid Distill on a folder of CIFAR-10 images: ViT-Tiny/4 student at 32 px, DeiT and MAE ViT-B teachers that see the
# images enlarged to 128 px, so that all have 8x8 patches. For one GPU, or to try things out. [choice] throughout.
# Cost and accuracy: not measured yet.
#
#   python tools/train.py configs/hdistill/vit-tiny_deit-mae_cifar10.py
_base_ = ['./vit-b_deit-mae_300e.py']

model = dict(
    backbone=dict(arch='deit-tiny', img_size=32, patch_size=4, drop_path_rate=0.0),
    losses=dict(relation=dict(relation_heads=12)))

# data/cifar10/{train,test}/CLASS/*.jpg
train_pipeline = [
    dict(type='mmhdistill.LoadImage'),
    dict(type='RandomResizedCrop', scale=32, crop_ratio_range=(0.2, 1.0), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='mmhdistill.LoadImage'), dict(type='PackInputs', meta_keys=('img_path', 'split'))]
train_dataloader = dict(
    batch_size=128, num_workers=2, dataset=dict(data_root='data/cifar10/train', pipeline=train_pipeline))
test_dataloader = dict(
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                type='mmhdistill.ImageFolder',
                data_root=f'data/cifar10/{folder}',
                with_label=True,
                split=split,
                pipeline=test_pipeline) for folder, split in (('train', 'bank'), ('test', 'query'))
        ]))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=5, eta_min=1e-6, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
auto_scale_lr = dict(base_batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
