# Fine-tuning on IN-1K, ViT-L/16 student, 50 epochs: layer decay 0.75, drop path 0.2. Read-out of the mean patch token:
# [choice], see the base. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/classification/vit-l_ft-50e_in1k.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
# Images: data/imagenet/{train,val}.
_base_ = './vit-b_ft-100e_in1k.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='mmhdistill:work_dirs/vit-l_clip-mae_300e/epoch_300.pth')),
    head=dict(in_channels=1024))

# 8 x 64 images, twice: the base batch of 1024.
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(accumulative_counts=2, paramwise_cfg=dict(layer_decay_rate=0.75))
train_cfg = dict(max_epochs=50)
