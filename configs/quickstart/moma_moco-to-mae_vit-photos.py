# Quick start of MOMA, mechanism 1: the MoCo v3 teacher, a student that starts from the MAE's weights.
# [choice] throughout.
#
#   python tools/train.py configs/quickstart/moma_moco-to-mae_vit-photos.py
_base_ = './moma_moco-mae_vit-photos.py'

model = dict(
    backbone=dict(init_from={{_base_.mae}}),
    losses=dict(mae=dict(loss_weight=0)))
