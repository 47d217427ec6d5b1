# Linear probe on iNaturalist 2019, frozen ViT-B/16 student: IN-1K's recipe with other data [choice].
# Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/classification/vit-b_linear-100e_inat19.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
# Images: data/inat19/{train,val}/CLASS/*.jpg, 1010 classes.
_base_ = './vit-b_linear-100e_in1k.py'

model = dict(head=dict(num_classes=1010))
data_preprocessor = dict(num_classes=1010)
train_dataloader = dict(
    dataset=dict(
        _delete_=True, type='CustomDataset', data_root='data/inat19/train', with_label=True,
        pipeline={{_base_.train_pipeline}}))
val_dataloader = dict(
    dataset=dict(
        _delete_=True, type='CustomDataset', data_root='data/inat19/val', with_label=True,
        pipeline={{_base_.test_pipeline}}))
test_dataloader = dict(
    dataset=dict(
        _delete_=True, type='CustomDataset', data_root='data/inat19/val', with_label=True,
        pipeline={{_base_.test_pipeline}}))
