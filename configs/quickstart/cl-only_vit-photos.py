# Quick start, for comparison: the features of the supervised teacher alone, every token. The MAE teacher does not run.
#
#   python tools/train.py configs/quickstart/cl-only_vit-photos.py
_base_ = './hdistill_vit-photos.py'

model = dict(masker=None, losses=dict(relation=dict(loss_weight=0)))
custom_hooks = []
