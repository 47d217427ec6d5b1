# UperNet on ADE20K, ViT-L/16 student: as ViT-B, features after layers 8, 12, 16 and 24, drop path 0.2, layer decay 0.75
# [choice]. Cost and accuracy: not measured yet. Needs the full mmcv.
#
#   tools/dist_train.sh configs/transfer/segmentation/upernet_vit-l_512_160k_ade20k.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
_base_ = './upernet_vit-b_512_160k_ade20k.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.2,
        out_indices=(7, 11, 15, 23),
        init_cfg=dict(checkpoint='mmhdistill:work_dirs/vit-l_clip-mae_300e/epoch_300.pth')),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.75))
