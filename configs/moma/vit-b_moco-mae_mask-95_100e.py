# MOMA, mechanism 3 with 95 % of the patches masked. The rest as in vit-b_moco-mae_100e.py. Cost and accuracy: not
# measured yet.
#
#   tools/dist_train.sh configs/moma/vit-b_moco-mae_mask-95_100e.py 8
_base_ = './vit-b_moco-mae_100e.py'

model = dict(masker=dict(keep_rate=0.05))
