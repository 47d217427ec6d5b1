# As mask-rcnn_vitdet-b_lsj-100e_coco.py with ViTDet-L, from a student ViT-L/16: layer decay 0.8, drop path 0.4.
# [choice]: 8 processes of 2 images, four steps added up. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/detection/mask-rcnn_vitdet-l_lsj-100e_coco.py 8
_base_ = './mask-rcnn_vitdet-b_lsj-100e_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='mmhdistill:work_dirs/vit-l_clip-mae_300e/epoch_300.pth')),
    neck=dict(in_channels=1024))
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=4, paramwise_cfg=dict(layer_decay_rate=0.8))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=25, milestones=[22, 24], gamma=0.1),
]
