# Hybrid Distill as the study compares it, on a GPU: ViT-Tiny and all of CIFAR-10. [choice] throughout.
#
#   python tools/train.py studies/hybrid_on_cifar10/gpu/hybrid.py
_base_ = '../cpu/hybrid.py'

card = dict(embed_dims=192, depth=12, num_heads=3)
model = dict(
    backbone=dict(arch=dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768)),
    teachers=dict(
        supervised=dict(card=card, checkpoint='work_dirs/supervised/epoch_60.pth'),
        moco=dict(card=card, checkpoint='work_dirs/moco/epoch_200.pth'),
        mae=dict(card=card, checkpoint='work_dirs/mae/epoch_200.pth')))
train_dataloader = dict(batch_size=256, num_workers=8, dataset=dict(stride=1))
train_cfg = dict(max_epochs=60)
test_dataloader = dict(
    num_workers=8,
    dataset=dict(
        datasets=[
            dict(
                type='mmhdistill.ImageFolder',
                data_root=f'data/cifar10/{folder}',
                with_label=True,
                split=split,
                pipeline={{_base_.test_pipeline}}) for folder, split in (('train', 'bank'), ('test', 'query'))
        ]))
