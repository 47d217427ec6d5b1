# A linear classifier on a frozen ViT-B/16, behind batch norm without affine, as in MAE. Frozen is in mmpretrain no
# gradient, and not eval mode: drop path is off, so that both modes compute the same.
_base_ = './classifier_vit-base-p16.py'

# Each process counts the statistics of the norm of its own images: validated and saved is their mean.
custom_hooks = [dict(type='mmhdistill.DataCheck'), dict(type='SyncBuffersHook')]
model = dict(
    # All layers: another depth needs another number.
    backbone=dict(frozen_stages=12, drop_path_rate=0.0),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=768)],
    head=dict(
        loss=dict(_delete_=True, type='CrossEntropyLoss'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.01)))
