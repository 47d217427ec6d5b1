# Fine-tuning a model of the study on labels, whole, on a GPU; from random weights: model.backbone.init_cfg=None.
#
#   python tools/train.py studies/hybrid_on_cifar10/gpu/finetune.py \
#       --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
_base_ = '../cpu/finetune.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768)),
    head=dict(in_channels=192))
train_dataloader = dict(batch_size=256, num_workers=8, dataset=dict(stride=1))
test_dataloader = dict(num_workers=8)
train_cfg = dict(max_epochs=30)
