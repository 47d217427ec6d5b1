# Quick start, teacher 1: a ViT of width 64 and depth 4 trained on labels with mmpretrain's classifier.
#
#   python tools/train.py configs/quickstart/supervised_vit-photos.py
_base_ = [
    '../_base_/datasets/photo_crops.py',
    '../_base_/schedules/quickstart.py',
    '../_base_/quickstart_runtime.py',
]

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[120, 120, 120], std=[60, 60, 60], to_rgb=True, num_classes=18),
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=256),
        img_size=32,
        patch_size=4,
        out_type='featmap'),
    # The mean patch token is classified: every token learns to be global, as in late layers of contrastive teachers.
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=18, in_channels=64, loss=dict(type='CrossEntropyLoss')))
train_cfg = dict(max_epochs=10)
