# Teacher: the ViT trained with mmpretrain's MAE. [choice]: 60 % masked, a decoder of one layer and the encoder's width.
#
#   python tools/train.py studies/hybrid_on_cifar10/cpu/mae.py
_base_ = './base.py'

model = dict(
    type='MAE',
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor', mean={{_base_.mean}}, std={{_base_.std}}, bgr_to_rgb=True),
    backbone=dict(type='MAEViT', arch={{_base_.arch}}, img_size=32, patch_size=4, mask_ratio=0.6),
    neck=dict(
        type='MAEPretrainDecoder',
        num_patches=64,
        patch_size=4,
        in_chans=3,
        embed_dim=64,
        decoder_embed_dim=64,
        decoder_depth=1,
        decoder_num_heads=4,
        mlp_ratio=4.0),
    head=dict(
        type='MAEPretrainHead', norm_pix=True, patch_size=4, loss=dict(type='PixelReconstructionLoss', criterion='L2')))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=30)
