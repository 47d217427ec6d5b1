# Fine-tuning a model of the study on labels, whole; from random weights: model.backbone.init_cfg=None.
# [choice] throughout.
#
#   python tools/train.py studies/hybrid_on_cifar10/cpu/finetune.py \
#       --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
_base_ = './supervised.py'

model = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        final_norm=True,
        init_cfg=dict(type='Pretrained', checkpoint='mmhdistill:work_dirs/hybrid/epoch_8.pth')))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.75))
custom_hooks = [dict(type='mmhdistill.DataCheck')]
train_cfg = dict(max_epochs=5)
test_cfg = dict()
test_dataloader = dict(
    batch_size=256,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmhdistill.ImageFolder',
        data_root='data/cifar10/test',
        with_label=True,
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
test_evaluator = dict(type='Accuracy', topk=(1, ))
