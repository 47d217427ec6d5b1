# Masked feature reconstruction (MVP, MaskDistill, dBOT): ViT-B/16 student, CLIP ViT-B teacher, IN-1K, 300 epochs.
# The design: a student that sees a part of the patches, and an asymmetric decoder that predicts the teacher's features
# at the others. Hybrid Distill's analysis is about its depth. [choice]: 75 % masked at random as in MAE, a decoder of
# one layer and width 512, whitened features, SmoothL1 with beta 2. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/baselines/mfr_vit-b_clip_300e.py 8
_base_ = [
    '../_base_/models/student_vit-base-p16.py',
    '../_base_/datasets/imagenet_1k.py',
    '../_base_/schedules/adamw_cosine.py',
    '../_base_/default_runtime.py',
]

model = dict(
    teachers=dict(clip=dict(type='mmhdistill.ViTTeacher', card='clip-vit-b-p16')),
    masker=dict(
        type='mmhdistill.ProgressiveTokenMasker',
        place='input',
        num_stages=1,
        keep_rate=0.25,
        scorer=dict(type='mmhdistill.RandomScorer')),
    losses=dict(
        reconstruction=dict(
            type='mmhdistill.MaskedFeatureLoss',
            teacher='clip',
            decoder=dict(type='mmhdistill.MaskDecoder', embed_dims=512, depth=1, num_heads=8))))
