# AdamW with layer decay, linear warm-up, cosine decay to the end of training, as in MAE's fine-tuning. The base batch
# is 1024.
optim_wrapper = dict(
    type='mmhdistill.auto_amp_optim_wrapper',
    optimizer=dict(type='AdamW', lr=5e-4 * 1024 / 256, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.65))

# mmengine gives an eta_min to all layers alike. MAE's minimum, 1e-6, is scaled by layer as the rate is: this ratio of
# IN-1K's 2e-3. Recipes with another rate keep the ratio [choice].
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=5, eta_min_ratio=5e-4, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=1024)
