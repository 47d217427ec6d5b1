# Teacher: the ViT trained on labels, as DeiT is, by its mean patch token. [choice] throughout.
#
#   python tools/train.py studies/hybrid_on_cifar10/cpu/supervised.py
_base_ = './base.py'

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean={{_base_.mean}}, std={{_base_.std}}, to_rgb=True, num_classes=10),
    backbone=dict(
        type='VisionTransformer', arch={{_base_.arch}}, img_size=32, patch_size=4, out_type='featmap'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss')))
train_cfg = dict(max_epochs=20)
