# MOMA: a student that is fed 10 % of the patches, drawn at random, learns the features of one teacher or of both at
# these patches and the class token. A config names the teachers and the losses.
_base_ = './student_vit-base-p16.py'

model = dict(
    masker=dict(
        type='mmhdistill.ProgressiveTokenMasker',
        place='input',
        num_stages=1,
        keep_rate=0.1,
        scorer=dict(type='mmhdistill.RandomScorer')))

custom_hooks = [dict(type='mmhdistill.RedundantTokenMasker')]
