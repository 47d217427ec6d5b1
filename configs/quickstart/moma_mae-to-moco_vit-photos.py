# Quick start of MOMA, mechanism 2: the MAE teacher, a student that starts from the MoCo v3's weights.
# [choice] throughout.
#
#   python tools/train.py configs/quickstart/moma_mae-to-moco_vit-photos.py
_base_ = './moma_moco-mae_vit-photos.py'

model = dict(
    backbone=dict(init_from={{_base_.moco}}),
    losses=dict(moco=dict(loss_weight=0)))
