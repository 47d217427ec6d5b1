# The control of MOMA: the teacher, trained on by its own method for as long as a student of MOMA is.
#
#   python tools/train.py studies/hybrid_on_cifar10/cpu/mae_longer.py
_base_ = './mae.py'

load_from = 'work_dirs/mae/epoch_30.pth'
train_cfg = dict(max_epochs=8)
