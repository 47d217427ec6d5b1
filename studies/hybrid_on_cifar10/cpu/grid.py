# Every method of the study, as what differs from hybrid.py.
#
#   python tools/ablate.py studies/hybrid_on_cifar10/cpu/grid.py --out work_dirs/grid
config = 'hybrid.py'
seeds = [0, 1]

whole = dict(masker=None)
unmasked = [dict(type='mmhdistill.DiversityReportHook')]
reconstruction = dict(
    type='mmhdistill.MaskedFeatureLoss',
    teacher='supervised',
    decoder=dict(type='mmhdistill.MaskDecoder', embed_dims=64, num_heads=4))
mfr = dict(
    masker=dict(teacher=None, num_stages=1, keep_rate=0.25, scorer=dict(type='mmhdistill.RandomScorer')))
align = dict(type='mmhdistill.FeatureLoss', projector=dict(type='mmhdistill.MLPProjector'), include_cls=True)
moma = dict(
    masker=dict(teacher=None, num_stages=1, keep_rate=0.1, scorer=dict(type='mmhdistill.RandomScorer')))
to_moco, to_mae = (dict(_delete_=True, teacher=name, **align) for name in ('moco', 'mae'))
start = {
    name: dict(init_from=dict(
        card=dict(name=name, embed_dims=64, depth=6, num_heads=4, patch_size=4, img_size=32,
                  mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]),
        checkpoint=f'work_dirs/{name}/epoch_{epochs}.pth')) for name, epochs in (('moco', 60), ('mae', 30))
}

cells = {
    'FD': dict(model=dict(losses=dict(relation=None), **whole), custom_hooks=unmasked),
    'FD, 75 % masked': dict(model=dict(losses=dict(relation=None), **mfr)),
    'FD of MoCo': dict(model=dict(losses=dict(feature=dict(teacher='moco'), relation=None), **whole),
                       custom_hooks=unmasked),
    'relations': dict(model=dict(losses=dict(feature=None), **whole), custom_hooks=unmasked),
    'MFR, depth 1': dict(model=dict(
        losses=dict(feature=None, relation=None, reconstruction=reconstruction), **mfr)),
    'MFR, depth 8': dict(model=dict(
        losses=dict(feature=None, relation=None,
                    reconstruction={**reconstruction, 'decoder': {**reconstruction['decoder'], 'depth': 8}}), **mfr)),
    'Hybrid, no mask': dict(model=whole, custom_hooks=unmasked),
    'Hybrid of MoCo, no mask': dict(model=dict(losses=dict(feature=dict(teacher='moco')), **whole),
                                    custom_hooks=unmasked),
    'Hybrid, input mask': dict(),
    'Hybrid, one stage': dict(model=dict(masker=dict(num_stages=1, keep_rate=0.343))),
    'Hybrid, encoder mask': dict(model=dict(masker=dict(place='encoder', teacher=None))),
    'Hybrid, random mask': dict(model=dict(
        masker=dict(teacher=None, scorer=dict(type='mmhdistill.RandomScorer')))),
    'MOMA, MoCo to MAE': dict(model=dict(
        backbone=start['mae'], losses=dict(feature=to_moco, relation=None), **moma)),
    'MOMA, MAE to MoCo': dict(model=dict(
        backbone=start['moco'], losses=dict(feature=to_mae, relation=None), **moma)),
    'MOMA, both': dict(model=dict(losses=dict(feature=to_moco, relation=to_mae), **moma)),
}
