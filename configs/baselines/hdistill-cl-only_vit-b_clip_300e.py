# Hybrid Distill without its relations: ViT-B/16 student, CLIP ViT-B teacher, IN-1K, 300 epochs. The teacher scores the
# tokens. The MAE teacher is neither built nor run. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/baselines/hdistill-cl-only_vit-b_clip_300e.py 8
_base_ = '../hdistill/vit-b_clip-mae_300e.py'

model = dict(masker=dict(teacher='clip'), losses=dict(relation=dict(loss_weight=0)))
