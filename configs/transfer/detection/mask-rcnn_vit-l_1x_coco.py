# As mask-rcnn_vit-b_1x_coco.py with a student ViT-L/16, as CAE's: maps of blocks 8, 12, 16 and 24, AdamW 2e-4, layer
# decay 0.85. [choice]: 8 processes of 2 images, two steps added up. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/detection/mask-rcnn_vit-l_1x_coco.py 8
_base_ = './mask-rcnn_vit-b_1x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        out_indices=[7, 11, 15, 23],
        init_cfg=dict(checkpoint='mmhdistill:work_dirs/vit-l_clip-mae_300e/epoch_300.pth')),
    neck=[
        dict(type='mmhdistill.DeconvPyramid', in_channels=1024),
        dict(type='FPN', in_channels=[1024, 1024, 1024, 1024], out_channels=256, num_outs=5),
    ])
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    accumulative_counts=2, optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay_rate=0.85))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[9, 11], gamma=0.1),
]
