# A distilled ViT-B/16 and a linear classifier, to be trained whole. The classifier reads the mean patch token after the
# student's own final norm, as k-NN does: each tensor of the student is loaded and none but the classifier's is new
# [choice]. MAE reads the mean patch token too, through a norm that is new; there the student's final norm is dropped.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        drop_path_rate=0.1,
        out_type='featmap',
        final_norm=True,
        init_cfg=dict(
            type='Pretrained', checkpoint='mmhdistill:work_dirs/vit-b_clip-mae_300e/epoch_300.pth')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original', num_classes=1000),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=2e-5)))

# Another number of classes has to be told to head, loss and data_preprocessor.
custom_hooks = [dict(type='mmhdistill.DataCheck')]
