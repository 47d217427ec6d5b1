# Hybrid Distill: ViT-L/16 student, CLIP ViT-L/14 and MAE ViT-L/16 teachers, ImageNet-21K, 40 epochs.
# The paper states: both teachers frozen, student from random weights, final features of one teacher and token relations
# of the other, progressive redundant token masking, alpha = beta = 1 for its own distances.
# [choice]: this length; SmoothL1 on whitened features and KL of qk relations, both at the stated weight of 1. The rest
# follows MAE and TinyMIM practice, see docs/method.md. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/hdistill/vit-l_clip-mae_in21k-40e.py 8
_base_ = './vit-l_clip-mae_300e.py'

# data/imagenet21k/CLASS/*.JPEG, labels unused.
train_dataloader = dict(dataset=dict(data_root='data/imagenet21k'))
train_cfg = dict(max_epochs=40)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=2, eta_min=1e-6, convert_to_iter_based=True),
]
