# Hybrid Distill with an MAE teacher for the token relations. A config adds the contrastive or supervised teacher for
# the features, and names it in losses.feature.teacher.
model = dict(
    type='mmhdistill.HybridDistiller',
    data_preprocessor=dict(
        type='ImgDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        type='mmhdistill.MaskableVisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        drop_path_rate=0.1,
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform')),
    teachers=dict(mae=dict(type='mmhdistill.ViTTeacher', card='mae-vit-b-p16')),
    masker=dict(
        type='mmhdistill.ProgressiveTokenMasker',
        place='input',
        keep_rate=0.7,
        scorer=dict(type='mmhdistill.SimilarityScorer'),
        teacher='mae'),
    losses=dict(
        feature=dict(type='mmhdistill.FeatureLoss'),
        relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae')))

custom_hooks = [dict(type='mmhdistill.RedundantTokenMasker')]
