# Hybrid Distill as the study compares it: features of the supervised teacher, relations of the MAE, input masking with
# three stages that keep 70 % each. The other methods differ from it in grid.py. [choice] throughout.
#
#   python tools/train.py studies/hybrid_on_cifar10/cpu/hybrid.py
_base_ = './base.py'

card = dict(
    embed_dims=64, depth=6, num_heads=4, patch_size=4, img_size=32, mean={{_base_.mean}}, std={{_base_.std}})
model = dict(
    type='mmhdistill.HybridDistiller',
    data_preprocessor=dict(type='ImgDataPreprocessor', mean={{_base_.mean}}, std={{_base_.std}}, bgr_to_rgb=True),
    backbone=dict(
        type='mmhdistill.MaskableVisionTransformer', arch={{_base_.arch}}, img_size=32, patch_size=4),
    # One that no loss reads is neither loaded nor run.
    teachers=dict(
        supervised=dict(
            type='mmhdistill.ViTTeacher',
            card=dict(name='supervised', **card),
            checkpoint='work_dirs/supervised/epoch_20.pth'),
        moco=dict(
            type='mmhdistill.ViTTeacher', card=dict(name='moco', **card), checkpoint='work_dirs/moco/epoch_60.pth'),
        mae=dict(
            type='mmhdistill.ViTTeacher', card=dict(name='mae', **card), checkpoint='work_dirs/mae/epoch_30.pth')),
    masker=dict(type='mmhdistill.ProgressiveTokenMasker', place='input', keep_rate=0.7, teacher='mae'),
    losses=dict(
        feature=dict(type='mmhdistill.FeatureLoss', teacher='supervised'),
        relation=dict(type='mmhdistill.TokenRelationLoss', teacher='mae', loss_weight=0.3)))

custom_hooks = [dict(type='mmhdistill.RedundantTokenMasker'), dict(type='mmhdistill.DiversityReportHook')]
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=8)

# k-NN of a tenth, for the table of tools/ablate.py; the study's own measures, of all images, are in measure.py.
test_dataloader = dict(
    batch_size=256,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(
                type='mmhdistill.ImageFolder',
                data_root=f'data/cifar10/{folder}',
                with_label=True,
                stride=stride,
                split=split,
                pipeline={{_base_.test_pipeline}})
            for folder, split, stride in (('train', 'bank', 10), ('test', 'query', 10))
        ]))
test_cfg = dict()
test_evaluator = dict(type='mmhdistill.KNNMetric')
