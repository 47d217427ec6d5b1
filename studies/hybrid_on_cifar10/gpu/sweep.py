# The weight of the relations and their distance, one seed, on a GPU.
#
#   python tools/ablate.py studies/hybrid_on_cifar10/gpu/sweep.py --out work_dirs/sweep
_base_ = '../cpu/sweep.py'
