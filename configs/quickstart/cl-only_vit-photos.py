# Quick start, for comparison: the same student from the features of the supervised teacher alone, which also scores the
# tokens then. The MAE teacher does not run.
#
#   python tools/train.py configs/quickstart/cl-only_vit-photos.py
_base_ = './hdistill_vit-photos.py'

model = dict(masker=dict(teacher='supervised'), losses=dict(relation=dict(loss_weight=0)))
