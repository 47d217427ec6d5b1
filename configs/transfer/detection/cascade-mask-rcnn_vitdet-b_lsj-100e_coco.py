# Cascade Mask R-CNN with ViTDet-B (arXiv 2203.16527) on COCO, from a student ViT-B/16: three box heads for IoU 0.5, 0.6
# and 0.7, the rest as in mask-rcnn_vitdet-b_lsj-100e_coco.py. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/detection/cascade-mask-rcnn_vitdet-b_lsj-100e_coco.py 8
#
# Another student: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', '../../_base_/vitdet_lsj-100e_coco.py']

layer_norm = dict(type='mmpretrain.LN2d', eps=1e-6)
model = dict(
    # Smaller images are filled up to the size that positions are of, after normalisation.
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type='mmhdistill.ViTDet',
        arch='base',
        img_size=1024,
        patch_size=16,
        window_size=14,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mmhdistill:work_dirs/vit-b_clip-mae_300e/epoch_300.pth')),
    neck=dict(_delete_=True, type='mmhdistill.SimpleFPN', in_channels=768, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=layer_norm,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=stds),
                reg_class_agnostic=True,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0))
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
        mask_head=dict(norm_cfg=layer_norm)))
