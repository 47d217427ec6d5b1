# Teacher: ViT-Tiny trained on labels with all of CIFAR-10.
#
#   python tools/train.py studies/hybrid_on_cifar10/gpu/supervised.py
_base_ = '../cpu/supervised.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768)),
    head=dict(in_channels=192))
train_dataloader = dict(batch_size=256, num_workers=8, dataset=dict(stride=1))
train_cfg = dict(max_epochs=60)
