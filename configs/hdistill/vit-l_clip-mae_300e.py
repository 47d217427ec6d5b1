# Hybrid Distill: ViT-L/16 student, CLIP ViT-L/14 (features) and MAE ViT-L/16 (relations) teachers, IN-1K, 300 epochs.
# The paper states: both teachers frozen, student from random weights, final features of one teacher and token relations
# of the other, progressive redundant token masking, alpha = beta = 1 for its own distances.
# [choice]: this length; SmoothL1 on whitened features and KL of qk relations, both at the stated weight of 1. The rest
# follows MAE and TinyMIM practice, see docs/method.md. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/hdistill/vit-l_clip-mae_300e.py 8
_base_ = './vit-b_clip-mae_300e.py'

# The /14 teacher sees 196 px, so that its patch grid is the student's 14x14.
model = dict(
    backbone=dict(arch='large', drop_path_rate=0.2),
    teachers=dict(clip=dict(card='clip-vit-l-p14'), mae=dict(card='mae-vit-l-p16')))

# 8 x 128 images, twice: the base batch of 2048.
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(accumulative_counts=2)
