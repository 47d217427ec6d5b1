# Hybrid Distill: ViT-B/16 student, DeiT (features) and MAE (relations) ViT-B teachers, IN-1K, 300 epochs.
# The paper states: both teachers frozen, student from random weights, final features of one teacher and token relations
# of the other, progressive redundant token masking, alpha = beta = 1 for its own distances, 300 epochs of IN-1K.
# [choice]: SmoothL1 on whitened features and KL of qk relations, both at the stated weight of 1. The rest follows MAE
# and TinyMIM practice, see docs/method.md. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/hdistill/vit-b_deit-mae_300e.py 8
_base_ = [
    '../_base_/models/hdistill_vit-base-p16.py',
    '../_base_/datasets/imagenet_1k.py',
    '../_base_/schedules/adamw_cosine.py',
    '../_base_/default_runtime.py',
]

model = dict(
    teachers=dict(deit=dict(type='mmhdistill.ViTTeacher', card='deit-vit-b-p16')),
    losses=dict(feature=dict(teacher='deit')))
