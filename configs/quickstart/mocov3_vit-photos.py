# Quick start of MOMA, teacher 1: the same ViT trained with mmpretrain's MoCo v3.
#
#   python tools/train.py configs/quickstart/mocov3_vit-photos.py
_base_ = [
    '../_base_/datasets/photo_crops.py',
    '../_base_/schedules/quickstart.py',
    '../_base_/quickstart_runtime.py',
]

# Views of 20 px have 25 tokens instead of 64: more passes in the same time.
view = [
    dict(type='RandomResizedCrop', scale=20, crop_ratio_range=(0.3, 1.0), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, backend='cv2'),
]
train_dataloader = dict(
    dataset=dict(pipeline=[
        dict(type='mmhdistill.LoadImage'),
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
        type='SelfSupDataPreprocessor', mean=[120, 120, 120], std=[60, 60, 60], bgr_to_rgb=True),
    backbone=dict(
        type='MoCoV3ViT',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=256),
        img_size=32,
        patch_size=4),
    neck=dict(in_channels=64, num_layers=3, **neck),
    head=dict(
        type='MoCoV3Head',
        predictor=dict(in_channels=64, num_layers=2, **neck),
        loss=dict(type='CrossEntropyLoss', loss_weight=0.4),
        temperature=0.2))
optim_wrapper = dict(optimizer=dict(lr=3e-3))
train_cfg = dict(max_epochs=8)
