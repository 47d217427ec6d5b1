# LARS at 0.1 per 256 images, no weight decay, warm-up of 10 epochs, as in MAE's linear probe. A base batch of 4096
# images and 100 epochs are ours [choice].
optim_wrapper = dict(
    type='mmhdistill.auto_amp_optim_wrapper',
    optimizer=dict(type='LARS', lr=0.1 * 4096 / 256, momentum=0.9, weight_decay=0.0))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=10, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=4096)
