# Teacher: the ViT trained with mmpretrain's MoCo v3. [choice]: views of 24 px, 36 tokens instead of 64, for more passes
# in the same time.
#
#   python tools/train.py studies/hybrid_on_cifar10/cpu/moco.py
_base_ = './base.py'

view = [
    dict(type='RandomResizedCrop', scale=24, crop_ratio_range=(0.3, 1.0), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    # No change of hue: mmcv 2.1 fails at it with NumPy 2.
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, backend='cv2'),
    dict(type='RandomGrayscale', prob=0.2, keep_channels=True, color_format='bgr'),
]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='MultiView', num_views=2, transforms=[view]),
            dict(type='PackInputs')
        ]))

neck = dict(
    type='NonLinearNeck', hid_channels=256, out_channels=64, with_bias=False, with_last_bn=True,
    with_last_bn_affine=False, with_last_bias=False, with_avg_pool=False, norm_cfg=dict(type='BN1d'))
model = dict(
    type='MoCoV3',
    base_momentum=0.02,
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor', mean={{_base_.mean}}, std={{_base_.std}}, bgr_to_rgb=True),
    backbone=dict(type='MoCoV3ViT', arch={{_base_.arch}}, img_size=32, patch_size=4),
    neck=dict(in_channels=64, num_layers=3, **neck),
    head=dict(
        type='MoCoV3Head',
        predictor=dict(in_channels=64, num_layers=2, **neck),
        loss=dict(type='CrossEntropyLoss', loss_weight=0.4),
        temperature=0.2))
optim_wrapper = dict(optimizer=dict(lr=3e-3))
train_cfg = dict(max_epochs=60)
