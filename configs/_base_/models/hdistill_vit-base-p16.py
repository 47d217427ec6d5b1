# Hybrid Distill with an MAE teacher for the token relations. A config adds the contrastive or supervised teacher for
# the features, and names it in losses.feature.teacher.
_base_ = './student_vit-base-p16.py'

model = dict(
    teachers=dict(mae=dict(type='mmhdistill.ViTTeacher', card='mae-vit-b-p16')),
    masker=dict(
        type='mmhdistill.ProgressiveTokenMasker',
        place='input',
        keep_rate=0.7,
        scorer=dict(type='mmhdistill.SimilarityScorer'),
        teacher='mae'),
    losses=dict(
        feature=dict(type='mmhdistill.FeatureLoss'),
        relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae')))

custom_hooks = [dict(type='mmhdistill.RedundantTokenMasker')]
