# MOMA, mechanism 1: teacher MoCo v3 ViT-B, student ViT-B/16 that starts from MAE's weights, IN-1K, 100 epochs.
# The paper states: the teacher sees the whole image, the student a masked one at an extremely high mask ratio; the
# normalised representation of the teacher is aligned with the projected one of the student; few epochs.
# [choice]: 90 % of the patches masked at random, alignment at the kept patches and the class token, LayerNorm without
# affine, a two-layer projector for each teacher, SmoothL1 with beta 2, 100 epochs. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/moma/vit-b_moco-to-mae_100e.py 8
_base_ = [
    '../_base_/models/moma_vit-base-p16.py',
    '../_base_/datasets/imagenet_1k.py',
    '../_base_/schedules/adamw_cosine.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(init_from=dict(card='mae-vit-b-p16')),
    teachers=dict(moco=dict(type='mmhdistill.ViTTeacher', card='mocov3-vit-b-p16')),
    losses=dict(
        moco=dict(
            type='mmhdistill.FeatureLoss',
            teacher='moco',
            projector=dict(type='mmhdistill.MLPProjector'),
            include_cls=True)))
train_cfg = dict(max_epochs=100)
