# Feature Distillation (arXiv 2205.14141): ViT-B/16 student, CLIP ViT-B teacher, all tokens, IN-1K, 300 epochs.
# Its recipe: whitened final features of the teacher, a linear layer on the student, SmoothL1 with beta 2. [choice]: the
# schedule and augmentation of this package's other recipes, so that one word is what differs. Cost and accuracy: not
# measured yet.
#
#   tools/dist_train.sh configs/baselines/fd_vit-b_clip_300e.py 8
_base_ = [
    '../_base_/models/student_vit-base-p16.py',
    '../_base_/datasets/imagenet_1k.py',
    '../_base_/schedules/adamw_cosine.py',
    '../_base_/default_runtime.py',
]

model = dict(
    teachers=dict(clip=dict(type='mmhdistill.ViTTeacher', card='clip-vit-b-p16')),
    losses=dict(feature=dict(type='mmhdistill.FeatureLoss', teacher='clip')))
