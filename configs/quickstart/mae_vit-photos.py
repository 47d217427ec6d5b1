# Quick start, teacher 2: the same ViT trained with mmpretrain's MAE.
#
#   python tools/train.py configs/quickstart/mae_vit-photos.py
_base_ = [
    '../_base_/datasets/photo_crops.py',
    '../_base_/schedules/quickstart.py',
    '../_base_/quickstart_runtime.py',
]

model = dict(
    type='MAE',
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor', mean=[120, 120, 120], std=[60, 60, 60], bgr_to_rgb=True),
    backbone=dict(
        type='MAEViT',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=256),
        img_size=32,
        patch_size=4,
        mask_ratio=0.6),
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

# In these few passes the encoder learns more where it sees more than MAE's quarter and the decoder is of its width.
optim_wrapper = dict(optimizer=dict(lr=2e-3))
