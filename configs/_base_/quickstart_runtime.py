_base_ = './default_runtime.py'

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100, max_keep_ckpts=1))
randomness = dict(seed=0)
log_processor = dict(window_size=20)
