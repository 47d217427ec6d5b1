# Hybrid Distill without its features: ViT-B/16 student, MAE ViT-B teacher, IN-1K, 300 epochs. The CLIP teacher is
# neither built nor run. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/baselines/hdistill-mim-only_vit-b_mae_300e.py 8
_base_ = '../hdistill/vit-b_clip-mae_300e.py'

model = dict(losses=dict(feature=dict(loss_weight=0)))
