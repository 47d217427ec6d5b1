# Hybrid Distill, the length for ablations: as vit-b_clip-mae_300e.py for 100 epochs.
# The paper states: both teachers frozen, student from random weights, final features of one teacher and token relations
# of the other, progressive redundant token masking, alpha = beta = 1 for its own distances.
# [choice]: this length; SmoothL1 on whitened features and KL of qk relations, both at the stated weight of 1. The rest
# follows MAE and TinyMIM practice, see docs/method.md. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/hdistill/vit-b_clip-mae_100e.py 8
_base_ = './vit-b_clip-mae_300e.py'

train_cfg = dict(max_epochs=100)
