# A linear classifier on a frozen ViT-B/16, behind batch norm without affine, as in MAE. Frozen is in mmpretrain no
# gradient, and not eval mode: drop path is off, so that both modes compute the same.
_base_ = './classifier_vit-base-p16.py'

# Running statistics of the norm are those of the first process's images, in all of them: what a checkpoint holds. Where
# an epoch ends, the last step's are the mean, so that all validate the same model.
model_wrapper_cfg = dict(type='MMDistributedDataParallel', broadcast_buffers=True)
custom_hooks = [dict(type='mmhdistill.DataCheck'), dict(type='SyncBuffersHook')]
model = dict(
    # All layers: another depth needs another number.
    backbone=dict(frozen_stages=12, drop_path_rate=0.0),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=768)],
    head=dict(
        loss=dict(_delete_=True, type='CrossEntropyLoss'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.01)))
