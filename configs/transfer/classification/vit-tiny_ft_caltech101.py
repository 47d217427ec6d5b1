# Fine-tuning on a folder of Caltech-101 images, 100 classes of natural photographs at 64 px: the ViT-Tiny/4 student of
# configs/hdistill/vit-tiny_deit-mae_cifar10.py, whose 8x8 positions are interpolated to 16x16. [choice] throughout.
#
#   python tools/train.py configs/transfer/classification/vit-tiny_ft_caltech101.py
#
# Other checkpoints, students and classes as in vit-tiny_ft_cifar10.py.
_base_ = [
    '../../_base_/models/classifier_vit-base-p16.py',
    '../../_base_/datasets/caltech101_labels.py',
    '../../_base_/schedules/finetune.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        arch='deit-tiny',
        img_size=64,
        patch_size=4,
        drop_path_rate=0.0,
        init_cfg=dict(checkpoint='mmhdistill:work_dirs/vit-tiny_deit-mae_cifar10/epoch_100.pth')),
    head=dict(num_classes=100, loss=dict(num_classes=100), in_channels=192))

optim_wrapper = dict(optimizer=dict(lr=5e-4), paramwise_cfg=dict(layer_decay_rate=0.75))
train_cfg = dict(max_epochs=50)
auto_scale_lr = dict(base_batch_size=128)
