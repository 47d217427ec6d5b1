# Mask R-CNN with ViTDet-B (arXiv 2203.16527) on COCO, from a student ViT-B/16: windows of 14 patches, four global
# blocks, relative positions, simple feature pyramid; two convolutions in the RPN, 4conv1fc box head, LayerNorm in box
# and mask heads; large-scale jitter at 1024 px, 100 epochs, batch 64, AdamW 1e-4, layer decay 0.7, drop path 0.1.
# [choice]: windows of 14 do not divide 64 patches, and tokens that only fill up the last window are no keys (Detectron2
# lets them take part). Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/detection/mask-rcnn_vitdet-b_lsj-100e_coco.py 8
#
# Another student: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../../_base_/vitdet_lsj-100e_coco.py']

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
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', norm_cfg=layer_norm),
        mask_head=dict(norm_cfg=layer_norm)))
