# Fine-tuning on a folder of CIFAR-10 images: the ViT-Tiny/4 student of configs/hdistill/vit-tiny_deit-mae_cifar10.py.
# For one GPU, or, with a smaller student, for a CPU. [choice] throughout; IN-1K's recipe with fewer epochs, without
# RandAugment, Mixup and CutMix.
#
#   python tools/train.py configs/transfer/classification/vit-tiny_ft_cifar10.py
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE; none, random weights:
# model.backbone.init_cfg=None. Another student, here the quick start's, which has a normalisation of its own:
#   model.backbone.arch._delete_=True model.backbone.arch.embed_dims=64 model.backbone.arch.num_layers=4
#   model.backbone.arch.num_heads=4 model.backbone.arch.feedforward_channels=256 model.head.in_channels=64
#   data_preprocessor.mean=120,120,120 data_preprocessor.std=60,60,60
# Other classes: model.head.num_classes, model.head.loss.num_classes and data_preprocessor.num_classes.
_base_ = [
    '../../_base_/models/classifier_vit-base-p16.py',
    '../../_base_/datasets/cifar10_labels.py',
    '../../_base_/schedules/finetune.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        arch='deit-tiny',
        img_size=32,
        patch_size=4,
        drop_path_rate=0.0,
        init_cfg=dict(checkpoint='mmhdistill:work_dirs/vit-tiny_deit-mae_cifar10/epoch_100.pth')),
    head=dict(num_classes=10, loss=dict(num_classes=10), in_channels=192))

optim_wrapper = dict(optimizer=dict(lr=5e-4), paramwise_cfg=dict(layer_decay_rate=0.75))
train_cfg = dict(max_epochs=50)
auto_scale_lr = dict(base_batch_size=128)
