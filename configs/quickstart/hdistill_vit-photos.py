# Quick start: Hybrid Distill from the two small teachers, a student of their size. [choice] throughout.
#
#   python tools/train.py configs/quickstart/hdistill_vit-photos.py
_base_ = [
    '../_base_/datasets/photo_crops.py',
    '../_base_/schedules/quickstart.py',
    '../_base_/quickstart_runtime.py',
]

# Both teachers were trained on the same images, with the same normalisation.
card = dict(embed_dims=64, depth=4, num_heads=4, patch_size=4, img_size=32, mean=(120, ) * 3, std=(60, ) * 3)

model = dict(
    type='mmhdistill.HybridDistiller',
    data_preprocessor=dict(
        type='ImgDataPreprocessor', mean=[120, 120, 120], std=[60, 60, 60], bgr_to_rgb=True),
    backbone=dict(
        type='mmhdistill.MaskableVisionTransformer',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=256),
        img_size=32,
        patch_size=4),
    teachers=dict(
        supervised=dict(
            type='mmhdistill.ViTTeacher',
            card=dict(name='supervised', **card),
            checkpoint='quickstart/supervised/epoch_10.pth'),
        mae=dict(
            type='mmhdistill.ViTTeacher', card=dict(name='mae', **card), checkpoint='quickstart/mae/epoch_12.pth')),
    masker=dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.7, teacher='mae'),
    losses=dict(
        feature=dict(type='mmhdistill.FeatureLoss', teacher='supervised'),
        # At weight 1 the price in k-NN accuracy is higher here.
        relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae', loss_weight=0.3)))

custom_hooks = [dict(type='mmhdistill.RedundantTokenMasker')]
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=6)
