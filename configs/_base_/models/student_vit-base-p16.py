# A ViT-B/16 student. A config adds teachers and losses.
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
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform')))
