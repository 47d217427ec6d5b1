# The control of MOMA: the teacher, trained on by its own method for as long as a student of MOMA is.
#
#   python tools/train.py studies/hybrid_on_cifar10/cpu/moco_longer.py
_base_ = './moco.py'

load_from = 'work_dirs/moco/epoch_60.pth'
train_cfg = dict(max_epochs=8)
