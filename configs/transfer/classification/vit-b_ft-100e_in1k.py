# Fine-tuning on IN-1K, ViT-B/16 student, 100 epochs: the recipe of CAE, MAE and TinyMIM, with layer decay 0.65 and drop
# path 0.1. Read-out of the mean patch token: [choice], see the base. Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/classification/vit-b_ft-100e_in1k.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
# Images: data/imagenet/{train,val}.
_base_ = [
    '../../_base_/models/classifier_vit-base-p16.py',
    # RandAugment(9, 0.5) and random erasing 0.25.
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../../_base_/schedules/finetune.py',
    '../../_base_/default_runtime.py',
]

model = dict(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
train_dataloader = dict(batch_size=128, num_workers=8, persistent_workers=True, drop_last=True)
