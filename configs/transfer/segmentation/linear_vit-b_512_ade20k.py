# Linear probe on ADE20K, frozen ViT-B/16 student: one 1x1 convolution on the patch tokens after the final norm, whose
# scores are enlarged to the image. [choice] throughout: 40k iterations, AdamW 1e-3, no weight decay.
# Cost and accuracy: not measured yet. Needs the full mmcv.
#
#   tools/dist_train.sh configs/transfer/segmentation/linear_vit-b_512_ade20k.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
_base_ = './upernet_vit-b_512_160k_ade20k.py'

model = dict(
    # Frozen is in mmpretrain no gradient, and not eval mode: drop path is off, so that both modes compute the same.
    # All layers: another depth needs another number.
    backbone=dict(frozen_stages=12, drop_path_rate=0.0, out_indices=(11, )),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='mmseg.FCNHead',
        in_channels=768,
        channels=768,
        in_index=0,
        num_convs=0,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type='mmseg.CrossEntropyLoss', loss_weight=1.0)),
    auxiliary_head=None)

optim_wrapper = dict(
    _delete_=True,
    type='mmhdistill.auto_amp_optim_wrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.0))
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
