# k-NN accuracy on IN-1K of a ViT-B/16 student: weighted, k = 20, bank of every tenth training image, by mean patch
# token and by class token. Nothing is trained, no teacher is built.
#
#   python tools/test.py configs/transfer/classification/vit-b_knn_in1k.py CHECKPOINT
#
# CHECKPOINT is of a distiller, or of a classifier that was trained from one. Other images: test_dataloader.dataset.
# datasets.0.data_root=BANK and test_dataloader.dataset.datasets.1.data_root=QUERIES, folders of the same classes.
_base_ = ['../../_base_/datasets/imagenet_1k.py', '../../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    backbone=dict(type='VisionTransformer', arch='base', img_size=224, patch_size=16, out_type='raw'),
    head=dict(type='mmhdistill.FeatureHead'))
train_dataloader = None
