# Teacher: ViT-Tiny trained with MoCo v3 on all of CIFAR-10, with views of all 32 px.
#
#   python tools/train.py studies/hybrid_on_cifar10/gpu/moco.py
_base_ = '../cpu/moco.py'

view = [
    dict(type='RandomResizedCrop', scale=32, crop_ratio_range=(0.3, 1.0), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    # No change of hue: mmcv 2.1 fails at it with NumPy 2.
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, backend='cv2'),
    dict(type='RandomGrayscale', prob=0.2, keep_channels=True, color_format='bgr'),
]
train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    dataset=dict(
        stride=1,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='MultiView', num_views=2, transforms=[view]),
            dict(type='PackInputs')
        ]))
model = dict(
    backbone=dict(arch=dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768)),
    neck=dict(in_channels=192, hid_channels=1024, out_channels=128),
    head=dict(predictor=dict(in_channels=128, hid_channels=1024, out_channels=128)))
train_cfg = dict(max_epochs=200)
