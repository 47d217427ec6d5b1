# MOMA, mechanism 3 with a compact student: teachers MoCo v3 and MAE ViT-B, student ViT-S/16 from random weights, IN-1K,
# 100 epochs. The rest as in vit-b_moco-mae_100e.py. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/moma/vit-s_moco-mae_100e.py 8
_base_ = './vit-b_moco-mae_100e.py'

model = dict(backbone=dict(arch='deit-small'))
