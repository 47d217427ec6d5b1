# Hybrid Distill, the length for ablations: as vit-b_clip-mae_300e.py for 100 epochs.
# The paper states: both teachers frozen, student from random weights, alpha = beta = 1, final features of one teacher
# and token relations of the other, progressive redundant token masking, IN-1K. The rest follows MAE and
# TinyMIM practice [choice]: see docs/method.md. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/hdistill/vit-b_clip-mae_100e.py 8
_base_ = './vit-b_clip-mae_300e.py'

train_cfg = dict(max_epochs=100)
