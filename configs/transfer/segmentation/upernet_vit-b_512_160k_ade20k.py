# UperNet on ADE20K, ViT-B/16 student: 512x512, 160k iterations, batch 16, AdamW 1e-4, layer decay 0.65, drop path 0.1,
# features after layers 4, 6, 8 and 12, 1500 iterations of warm-up, as in CAE and TinyMIM. [choice]: the last features
# are those after the student's own final norm, so that each of its tensors is loaded; mmseg's neck.
# Cost and accuracy: not measured yet. Needs the full mmcv.
#
#   tools/dist_train.sh configs/transfer/segmentation/upernet_vit-b_512_160k_ade20k.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
# Images: data/ade/ADEChallengeData2016. mmseg's own train.py takes this file too.
_base_ = [
    'mmseg::_base_/models/upernet_mae.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_160k.py',
]
custom_imports = dict(imports=['mmhdistill', 'mmpretrain.models'], allow_failed_imports=False)
runner_type = 'mmhdistill.ResumableRunner'
custom_hooks = [dict(type='mmhdistill.DataCheck')]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='base',
        img_size=512,
        patch_size=16,
        drop_path_rate=0.1,
        out_type='featmap',
        out_indices=(3, 5, 7, 11),
        init_cfg=dict(
            type='Pretrained', checkpoint='mmhdistill:work_dirs/vit-b_clip-mae_300e/epoch_300.pth')),
    neck=dict(embed_dim=768),
    decode_head=dict(in_channels=[768] * 4, channels=768, num_classes=150),
    auxiliary_head=dict(in_channels=768, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))

train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=16)
optim_wrapper = dict(
    _delete_=True,
    type='mmhdistill.auto_amp_optim_wrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.65))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
randomness = dict(seed=0)
