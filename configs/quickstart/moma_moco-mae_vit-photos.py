# Quick start of MOMA, mechanism 3: both small teachers, a student from random weights. [choice] throughout.
#
#   python tools/train.py configs/quickstart/moma_moco-mae_vit-photos.py
_base_ = [
    '../_base_/datasets/photo_crops.py',
    '../_base_/schedules/quickstart.py',
    '../_base_/quickstart_runtime.py',
]

# Both teachers were trained on the same images, with the same normalisation.
card = dict(embed_dims=64, depth=4, num_heads=4, patch_size=4, img_size=32, mean=(120, ) * 3, std=(60, ) * 3)
moco = dict(card=dict(name='moco', **card), checkpoint='quickstart/moco/epoch_8.pth')
mae = dict(card=dict(name='mae', **card), checkpoint='quickstart/mae/epoch_12.pth')
align = dict(type='mmhdistill.FeatureLoss', projector=dict(type='mmhdistill.MLPProjector'), include_cls=True)

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
        moco=dict(type='mmhdistill.ViTTeacher', **moco), mae=dict(type='mmhdistill.ViTTeacher', **mae)),
    masker=dict(
        type='mmhdistill.ProgressiveTokenMasker',
        place='input',
        num_stages=1,
        keep_rate=0.1,
        scorer=dict(type='mmhdistill.RandomScorer')),
    losses=dict(moco=dict(teacher='moco', **align), mae=dict(teacher='mae', **align)))

custom_hooks = [dict(type='mmhdistill.RedundantTokenMasker')]
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=6)
