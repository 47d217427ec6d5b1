# TinyMIM (arXiv 2301.01296): ViT-S/16 student, MAE ViT-B teacher, token relations, all tokens, IN-1K, 300 epochs.
# Its recipe: qk and vv relations of one intermediate layer of the teacher, class token included, KL, relation heads for
# the unequal widths. [choice]: teacher's layer 9 of 12 for the student's last; schedule and augmentation of this
# package's other recipes. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/baselines/tinymim_vit-s_mae-b_300e.py 8
_base_ = [
    '../_base_/models/student_vit-base-p16.py',
    '../_base_/datasets/imagenet_1k.py',
    '../_base_/schedules/adamw_cosine.py',
    '../_base_/default_runtime.py',
]

# Layers count from 0.
model = dict(
    backbone=dict(arch='deit-small'),
    teachers=dict(mae=dict(type='mmhdistill.ViTTeacher', card='mae-vit-b-p16')),
    losses=dict(
        relation=dict(
            type='mmhdistill.TokenRelationLoss',
            teacher='mae',
            layers=[(11, 8)],
            kinds=('qk', 'vv'),
            relation_heads=12,
            include_extra=True)))
