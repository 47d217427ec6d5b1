# AdamW, linear warm-up, cosine decay to the end of training; learning rate, betas and decay as in MAE, shorter warm-up
# and clipped gradients [choice]. The base batch is 2048.
optim_wrapper = dict(
    type='mmhdistill.auto_amp_optim_wrapper',
    optimizer=dict(type='AdamW', lr=1.5e-4 * 2048 / 256, betas=(0.9, 0.95), weight_decay=0.05),
    clip_grad=dict(max_norm=3.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            'pos_embed': dict(decay_mult=0.0),
            'cls_token': dict(decay_mult=0.0),
            'mask_token': dict(decay_mult=0.0),
        }))

# The cosine ends with training.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=15, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=15, eta_min=1e-6, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300)
auto_scale_lr = dict(base_batch_size=2048)
