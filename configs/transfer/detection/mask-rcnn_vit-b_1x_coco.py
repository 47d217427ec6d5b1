# Mask R-CNN 1x on COCO with a student ViT-B/16, the protocol of CAE (arXiv 2202.03026), by which the paper measures
# detection: global attention, maps of blocks 4, 6, 8 and 12, deconvolutions to strides 4 to 32, FPN; 4conv1fc box head
# with SyncBN and GIoU; 12 epochs, batch 32, AdamW 3e-4, layer decay 0.75, drop path 0.2.
# [choice]: positions stay those of 224 px and are resampled to each image's size; 8 processes of 4 images; warm-up of
# 500 steps as in mmdet. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/detection/mask-rcnn_vit-b_1x_coco.py 8
#
# Another student: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../../_base_/datasets/coco_multi-scale.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmhdistill', 'mmpretrain.models'], allow_failed_imports=False)
runner_type = 'mmhdistill.ResumableRunner'
custom_hooks = [dict(type='mmhdistill.DataCheck')]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        drop_path_rate=0.2,
        out_type='featmap',
        out_indices=[3, 5, 7, 11],
        final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint='mmhdistill:work_dirs/vit-b_clip-mae_300e/epoch_300.pth')),
    neck=[
        dict(type='mmhdistill.DeconvPyramid', in_channels=768),
        dict(type='FPN', in_channels=[768, 768, 768, 768], out_channels=256, num_outs=5),
    ],
    roi_head=dict(
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            norm_cfg=dict(type='SyncBN'),
            reg_decoded_bbox=True,
            loss_bbox=dict(type='GIoULoss', loss_weight=10.0))))

optim_wrapper = dict(
    type='mmhdistill.auto_amp_optim_wrapper',
    dtype='float16',  # RoIAlign has no kernel for bfloat16, in which boxes would lack digits
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.75))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[9, 11], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
auto_scale_lr = dict(base_batch_size=32)
