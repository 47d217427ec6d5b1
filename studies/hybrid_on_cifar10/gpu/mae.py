# Teacher: ViT-Tiny trained with MAE on all of CIFAR-10; a decoder of two layers and half the encoder's width. [choice]
#
#   python tools/train.py studies/hybrid_on_cifar10/gpu/mae.py
_base_ = '../cpu/mae.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768)),
    neck=dict(embed_dim=192, decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3))
train_dataloader = dict(batch_size=256, num_workers=8, dataset=dict(stride=1))
train_cfg = dict(max_epochs=200)
