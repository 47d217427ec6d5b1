# Linear probe on Stanford Cars, frozen ViT-B/16 student: IN-1K's recipe at a batch of 128 [choice].
# Cost and accuracy: not measured yet.
#
#   tools/dist_train.sh configs/transfer/classification/vit-b_linear-100e_cars.py 8
#
# Another checkpoint: --cfg-options model.backbone.init_cfg.checkpoint=mmhdistill:FILE
# Images: data/stanford_cars, as mmpretrain.StanfordCars reads them.
_base_ = './vit-b_linear-100e_in1k.py'

model = dict(head=dict(num_classes=196))
data_preprocessor = dict(num_classes=196)
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        _delete_=True, type='StanfordCars', data_root='data/stanford_cars', split='train',
        pipeline={{_base_.train_pipeline}}))
val_dataloader = dict(
    dataset=dict(
        _delete_=True, type='StanfordCars', data_root='data/stanford_cars', split='test',
        pipeline={{_base_.test_pipeline}}))
test_dataloader = dict(
    dataset=dict(
        _delete_=True, type='StanfordCars', data_root='data/stanford_cars', split='test',
        pipeline={{_base_.test_pipeline}}))

optim_wrapper = dict(optimizer=dict(lr=0.1 * 128 / 256))
auto_scale_lr = dict(base_batch_size=128)
