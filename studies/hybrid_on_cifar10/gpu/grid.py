# Every method of the study, as what differs from hybrid.py, with three seeds.
#
#   python tools/ablate.py studies/hybrid_on_cifar10/gpu/grid.py --out work_dirs/grid
_base_ = '../cpu/grid.py'
seeds = [0, 1, 2]

start = {
    name: dict(init_from=dict(card=dict(embed_dims=192, depth=12, num_heads=3),
                              checkpoint=f'work_dirs/{name}/epoch_200.pth')) for name in ('moco', 'mae')
}
decoder = dict(embed_dims=192, num_heads=3)
cells = {
    'MFR, depth 1': dict(model=dict(losses=dict(reconstruction=dict(decoder=decoder)))),
    'MFR, depth 8': dict(model=dict(losses=dict(reconstruction=dict(decoder=decoder)))),
    'MOMA, MoCo to MAE': dict(model=dict(backbone=start['mae'])),
    'MOMA, MAE to MoCo': dict(model=dict(backbone=start['moco'])),
}
