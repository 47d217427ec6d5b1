import copy
import functools
import re
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction
from mmengine.optim import AmpOptimWrapper
from torch import nn

from mmhdistill.engine import DataCheck, ResumableRunner, auto_amp_optim_wrapper, config_guard
from mmhdistill.engine.config_guard import component_problems, merge_checked
from mmhdistill.models import LinearProjector, MaskableVisionTransformer, TimmTeacher
from mmhdistill.models.maskers import RandomScorer
from tests.helpers import log_messages, tiny_distiller

ROOT = Path(__file__).parents[2]
HYBRID = ROOT / 'configs/hdistill/vit-b_clip-mae_300e.py'
TRANSFER = ROOT / 'configs/transfer'
MASK_RCNN = TRANSFER / 'detection/mask-rcnn_vitdet-b_lsj-100e_coco.py'
UPERNET = TRANSFER / 'segmentation/upernet_vit-b_512_160k_ade20k.py'
LINEAR = TRANSFER / 'segmentation/linear_vit-b_512_ade20k.py'
CONFIGS = [*(ROOT / 'configs').rglob('*.py'), *ROOT.glob('studies/*/[cg]pu/*.py')]
FOLDERS = sorted({str(path.parent.relative_to(ROOT)) for path in CONFIGS})


loaded = functools.cache(Config.fromfile)


@pytest.fixture
def cfg():
    return copy.deepcopy(loaded(HYBRID))


def ours(cfg):
    return [(path, settings) for path, settings in config_guard._nested('', dict(cfg.items()))
            if config_guard._is_ours(settings.get('type'))]


@pytest.mark.parametrize('folder', FOLDERS)
def test_component_problems__none_in_a_shipped_config_and_a_key_too_much_is_seen_in_each(folder):
    for path in sorted((ROOT / folder).glob('*.py')):
        cfg = Config.fromfile(path)
        assert component_problems(cfg) == [], path
        there = ours(cfg)
        # Settings that two paths share are one dict.
        for settings in {id(settings): settings for _, settings in there}.values():
            settings['wrong_key'] = 1
        found = component_problems(cfg)
        assert [problem.split(' is a ')[0] for problem in found] == [path for path, _ in there]
        assert all("no 'wrong_key' is taken: There is" in problem for problem in found)


def test_folders__are_all():
    assert len(FOLDERS) >= 14 and len(CONFIGS) >= 80


@pytest.mark.parametrize('model, problem', [
    (dict(losses=dict(feature=dict(type='mmhdistill.FeatureLoss', loss_wieght=0))),
     "model.losses.feature is a mmhdistill.FeatureLoss, and no 'loss_wieght' is taken: did you mean 'loss_weight'? "
     'There is distance, include_cls, '),
    (dict(type='mmhdistill.HybridDistiler'),
     "model.type is 'mmhdistill.HybridDistiler', and no 'HybridDistiler' is registered: did you mean "
     "'HybridDistiller'? There is BFloat16OptimWrapper, CLSAttentionScorer, "),
    (dict(losses=dict(featrue=dict(loss_weight=0), feature=dict(type='mmhdistill.FeatureLoss', teacher='clip'))),
     "model.losses.featrue has no type, and no 'featrue' is there: did you mean 'feature'? There is feature"),
    (dict(backbone=dict(type='mmhdistill.MaskableVisionTransformer', init_from=dict(card='x', chekpoint=None))),
     "model.backbone.init_from sets chekpoint, and no 'chekpoint' is taken: did you mean 'checkpoint'? There is card"),
    (dict(teachers=dict(own=dict(type='mmhdistill.ViTTeacher', card=dict(name='own', embed_dim=8)))),
     "model.teachers.own.card sets embed_dim, and no 'embed_dim' is taken: did you mean 'embed_dims'? There is "),
    (dict(masker=dict(type='mmhdistill.ProgressiveTokenMasker', scorer=dict(
        type='mmhdistill.RandomScorer', seed=1))),
     "model.masker.scorer is a mmhdistill.RandomScorer, and no 'seed' is taken: There is nothing"),
    (dict(masker=dict(type='mmhdistill.models.maskers.RandomScorer', seed=1)),
     "model.masker is a mmhdistill.models.maskers.RandomScorer, and no 'seed' is taken: There is nothing"),
    (dict(masker=dict(type=RandomScorer, seed=1)),
     "model.masker is a RandomScorer, and no 'seed' is taken: There is nothing"),
])
def test_component_problems__in_words(model, problem):
    found, = component_problems(Config(dict(model={'type': 'mmhdistill.HybridDistiller', **model})))
    assert found.startswith(problem)


@pytest.mark.parametrize('settings', [
    dict(model=tiny_distiller(teachers=dict(any_name=dict(type='mmhdistill.ViTTeacher', card='mae-vit-b-p16')))),
    dict(model=tiny_distiller(losses=dict(off=None, x=dict(type='mmhdistill.TokenRelationLoss', teacher='mae',
                                                           kinds=dict(qq=1.0, vv=0.5))))),
    # By name, by path and as the thing itself.
    *(dict(custom_hooks=[dict(type=kind, priority='LOW')])
      for kind in ('mmhdistill.DataCheck', 'mmhdistill.engine.DataCheck', DataCheck)),
    *(dict(optim_wrapper=dict(type=kind, constructor='X', paramwise_cfg=dict(anything=1), accumulative_counts=4,
                              clip_grad=dict(max_norm=1), optimizer=dict(type='AdamW'), dtype='float16'))
      for kind in ('mmhdistill.auto_amp_optim_wrapper', auto_amp_optim_wrapper)),
    dict(data=[[dict(type='mmhdistill.ImageFolder', data_root='x', pipeline=[], metainfo=dict(free=1), indices=3)]]),
    # Components of others are theirs to check.
    dict(model=dict(type='mmpretrain.VisionTransformer', nonsense=1)),
])
def test_component_problems__leaves_what_is_legitimate(settings):
    assert component_problems(Config(settings)) == []


def options_of(text):
    return {key: DictAction._parse_iterable(value) for key, value in (word.split('=', 1) for word in text.split(' '))}


def value_of(cfg, path):
    for key in path.split('.'):
        cfg = cfg[int(key)] if isinstance(cfg, (list, tuple)) else cfg[key]
    return cfg


def assert_merged(cfg, text):
    options = options_of(text)
    assert merge_checked(cfg, options) == []
    assert [value_of(cfg, path) for path in options] == list(options.values())


@pytest.mark.parametrize('text', [
    'model.losses.feature.loss_weight=0', 'model.teachers.clip.checkpoint=None', 'model.masker=None',
    'model.masker.scorer.type=mmhdistill.RandomScorer model.masker.teacher=None',
    'model.losses.extra.type=mmhdistill.FeatureLoss model.losses.extra.teacher=clip',
    # Like the name of another, and a component of its own all the same.
    'model.teachers.clip2.type=mmhdistill.ViTTeacher model.teachers.clip2.card=mae-vit-b-p16',
    'model.backbone.init_from.card=mae-vit-b-p16 model.backbone.init_from.checkpoint=None',
    'train_dataloader.prefetch_factor=4', 'train_dataloader.dataset.pipeline.1.scale=225',
    'test_dataloader.dataset.datasets.0.stride=1', 'optim_wrapper.accumulative_counts=4',
    'optim_wrapper.clip_grad.max_norm=4', 'optim_wrapper.optimizer.amsgrad=True',
    'optim_wrapper.optimizer.type=SGD optim_wrapper.optimizer.momentum=0.9',
    'optim_wrapper.paramwise_cfg.bypass_duplicate=True', 'train_cfg.max_epochs=3', 'default_hooks.logger=None',
    'default_hooks.checkpoint.priority=LOW', 'default_hooks.mine.type=EMAHook',
    # Hooks that the runner adds.
    'default_hooks.sentinel.max_skips=9', 'default_hooks.stop=None', 'default_hooks.manifest.allow_changed=[losses]',
    'randomness.seed=0', 'resume=True',
    'param_scheduler=None', 'param_scheduler.0.end=3', 'find_unused_parameters=True', 'load_from=x.pth',
    'env_cfg.cudnn_benchmark=True', 'auto_scale_lr.enable=True', 'custom_hooks.0.schedule=linear',
    'visualizer.vis_backends.0.type=TensorboardVisBackend', 'compile.mode=default',
    'activation_checkpointing=[backbone]', 'train_dataloader.disable_subprocess_warning=True',
    'log_processor.type=LogProcessor', 'optim_wrapper.type=AmpOptimWrapper optim_wrapper.loss_scale=dynamic',
    'runner_type=FlexibleRunner strategy.type=DeepSpeedStrategy strategy.zero_optimization.stage=2',
    'optim_wrapper.paramwise_cfg.custom_keys.pos.decay_mult=0',
])
def test_merge_checked__options_that_are_right(text, cfg):
    assert_merged(cfg, text)


@pytest.mark.parametrize('text', [
    'model.roi_head.bbox_head.num_classes=20 model.roi_head.mask_head.num_classes=20',
    # A name like another's of a class that hands its **kwargs on.
    'model.roi_head.bbox_head.conv_out_channels=128', 'model.roi_head.bbox_head.norm_cfg.requires_grad=False',
    'model.roi_head.mask_head.class_agnostic=True', 'model.backbone.with_cp=True', 'model.backbone.frozen_stages=2',
    'model.rpn_head.loss_bbox.type=SmoothL1Loss model.rpn_head.loss_bbox.beta=0.1',
    'model.train_cfg.rcnn.assigner.gpu_assign_thr=100', 'model.train_cfg.rpn.sampler.num=128',
    'model.test_cfg.rcnn.score_thr=0.3 model.test_cfg.rcnn.nms.type=soft_nms model.test_cfg.rcnn.nms.min_score=0.01',
    'model.data_preprocessor.batch_augments=None', 'model.data_preprocessor.non_blocking=True',
    'train_dataloader.dataset.dataset.metainfo.classes=[cat,dog] train_dataloader.dataset.dataset.indices=64',
    'val_dataloader.dataset.data_prefix.img=images/', 'val_dataloader.batch_sampler.type=AspectRatioBatchSampler',
    'val_evaluator.classwise=True val_evaluator.outfile_prefix=out/coco', 'val_evaluator.prefix=coco',
    'default_hooks.visualization.draw=True default_hooks.visualization.test_out_dir=shown',
    'default_hooks.checkpoint.save_best=coco/bbox_mAP default_hooks.checkpoint.rule=greater',
    'visualizer.vis_backends.0.type=WandbVisBackend visualizer.vis_backends.0.init_kwargs.project=vit',
    'optim_wrapper.clip_grad.max_norm=35 optim_wrapper.clip_grad.norm_type=2',
    'optim_wrapper.clip_grad.type=value optim_wrapper.clip_grad.clip_value=1',
    'optim_wrapper.type=AmpOptimWrapper optim_wrapper.clip_grad.max_norm=1 optim_wrapper.dtype=bfloat16',
    'optim_wrapper.constructor=LayerDecayOptimizerConstructor optim_wrapper.paramwise_cfg.decay_rate=0.7 '
    'optim_wrapper.paramwise_cfg.decay_type=layer_wise optim_wrapper.paramwise_cfg.num_layers=12',
    'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult=0.1', 'param_scheduler.1.verbose=True',
    'train_cfg.val_begin=10', 'env_cfg.dist_cfg.timeout=3600', 'auto_scale_lr.enable=True',
    'model_wrapper_cfg.type=MMDistributedDataParallel model_wrapper_cfg.static_graph=True', 'sync_bn=torch',
    'log_processor.num_digits=6',
])
def test_merge_checked__options_of_a_detector_that_are_right(text):
    assert_merged(copy.deepcopy(loaded(MASK_RCNN)), text)


@pytest.mark.parametrize('path', [UPERNET, LINEAR])
@pytest.mark.parametrize('text', [
    # Each like a name of the recipe: channels, in_index.
    'model.decode_head.out_channels=1 model.decode_head.threshold=0.3', 'model.decode_head.ignore_index=255',
    'model.decode_head.act_cfg.type=GELU', 'model.decode_head.loss_decode.avg_non_ignore=True',
    'model.decode_head.norm_cfg.type=BN model.decode_head.norm_cfg.requires_grad=True',
    'model.decode_head.norm_cfg.type=BN model.decode_head.norm_cfg.momentum=0.01',
    'model.decode_head.sampler.type=OHEMPixelSampler model.decode_head.sampler.thresh=0.7',
    'model.test_cfg.mode=whole', 'model.data_preprocessor.test_cfg.size_divisor=32', 'model.backbone.pre_norm=True',
    'train_dataloader.dataset.reduce_zero_label=False train_dataloader.dataset.ann_file=train.txt',
    'train_dataloader.dataset.data_prefix.img_path=images', 'val_evaluator.ignore_index=255 val_evaluator.beta=2',
    'val_evaluator.iou_metrics=[mIoU,mFscore]', 'default_hooks.checkpoint.save_best=mIoU', 'visualizer.alpha=0.6',
    'default_hooks.visualization.draw=True default_hooks.visualization.interval=10',
    'default_hooks.logger.log_metric_by_epoch=True', 'train_cfg.max_iters=80000', 'param_scheduler.1.end=80000',
    'optim_wrapper.clip_grad.max_norm=1', 'optim_wrapper.paramwise_cfg.bias_decay_mult=0',
    'optim_wrapper.type=OptimWrapper optim_wrapper.clip_grad.max_norm=1', 'find_unused_parameters=True',
    'log_processor.window_size=20', 'randomness.deterministic=True', 'env_cfg.cudnn_benchmark=False',
])
def test_merge_checked__options_of_a_segmentor_that_are_right(text, path):
    assert_merged(copy.deepcopy(loaded(path)), text)


@pytest.mark.parametrize('settings, text', [
    # Mixed precision has an argument of its own, and hands on the others.
    (dict(optim_wrapper=dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1))),
     'optim_wrapper.clip_grad.max_norm=1 optim_wrapper.paramwise_cfg.norm_decay_mult=0 optim_wrapper.constructor=X'),
    # One wrapper for each part of a model.
    (dict(optim_wrapper=dict(constructor='X', head=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))),
     'optim_wrapper.neck.type=OptimWrapper optim_wrapper.neck.optimizer.type=SGD optim_wrapper.neck.optimizer.lr=1'),
    (dict(custom_hooks=[dict(type=DataCheck)]), 'custom_hooks.0.priority=LOW'),
    (dict(runner_type=ResumableRunner, default_hooks=dict(timer=dict(type='IterTimerHook'))),
     'default_hooks.sentinel.max_skips=9'),
    # Of another library than the rest of the config.
    (dict(default_scope='mmseg', model=dict(type='X', backbone=dict(
        type='VisionTransformer', _scope_='mmpretrain'))), 'model.backbone.layer_scale_init_value=0.1'),
    # What a model of others reads of settings without a type, and what a function in C takes.
    (dict(model=dict(type='X', train_cfg=dict(assigner=dict(type='Y')))), 'model.train_cfg.hard_mining.ratio=3'),
    (dict(model=dict(type='X', act=dict(type='torch.nn.functional.gelu'))), 'model.act.approximate=tanh'),
])
def test_merge_checked__options_of_other_configs_that_are_right(settings, text):
    assert_merged(Config(settings), text)


@pytest.mark.parametrize('text, doubt', [
    # mmdet's head takes it out before it builds the layer.
    ('model.roi_head.mask_head.upsample_cfg.type=deconv model.roi_head.mask_head.upsample_cfg.scale_factor=2',
     "model.roi_head.mask_head.upsample_cfg: no 'scale_factor' is taken: There is bias, "),
    ('visualizer.vis_backends.0.name=x',
     "visualizer.vis_backends.0: no 'name' is taken: There is config_save_file, "),
    ('model.roi_head.bbox_head.num_clases=20',
     "model.roi_head.bbox_head: no 'num_clases' is known: did you mean 'num_classes'? There is bbox_coder, "),
    ('default_hooks.checkpoint.max_keep_ckpt=1',
     "default_hooks.checkpoint: no 'max_keep_ckpt' is known: did you mean 'max_keep_ckpts'? There is backend_args, "),
    ('optim_wrapper.paramwise_cfg.layer_decay_rat=0.8',
     "optim_wrapper.paramwise_cfg: no 'layer_decay_rat' is known: did you mean 'layer_decay_rate'? There is "
     'layer_decay_rate'),
])
def test_merge_checked__options_that_may_be_right_are_merged_with_a_warning(text, doubt):
    cfg, options = copy.deepcopy(loaded(MASK_RCNN)), options_of(text)
    with log_messages() as messages:
        found, = merge_checked(cfg, options)
    assert found in messages
    assert found.startswith(f'--cfg-options {list(options)[-1]}: {doubt}')
    assert [value_of(cfg, path) for path in options] == list(options.values())


@pytest.mark.parametrize('text, path, value', [
    ('optim_wrapper.clip_grad._delete_=True optim_wrapper.clip_grad.max_norm=35', 'optim_wrapper.clip_grad',
     dict(max_norm=35)),
    ('optim_wrapper.clip_grad.max_norm=35 optim_wrapper.clip_grad._delete_=True', 'optim_wrapper.clip_grad',
     dict(max_norm=35)),
    ('param_scheduler._delete_=True param_scheduler.type=ConstantLR', 'param_scheduler', dict(type='ConstantLR')),
    ('train_cfg._delete_=True train_cfg.by_epoch=True train_cfg.max_epochs=3', 'train_cfg',
     dict(by_epoch=True, max_epochs=3)),
    ('optim_wrapper.optimizer._delete_=True optim_wrapper.optimizer.type=SGD optim_wrapper.optimizer.lr=1',
     'optim_wrapper.optimizer', dict(type='SGD', lr=1)),
])
def test_merge_checked__delete_makes_room(text, path, value):
    cfg = Config(dict(
        optim_wrapper=dict(type='OptimWrapper', clip_grad=None, optimizer=dict(type='AdamW', betas=(0.9, 0.95))),
        param_scheduler=[dict(type='PolyLR')], train_cfg=dict(type='IterBasedTrainLoop', max_iters=9)))
    assert merge_checked(cfg, options_of(text)) == []
    assert value_of(cfg, path) == value


@pytest.mark.parametrize('text, problem', [
    ('model.losses.featrue.loss_weight=0',
     "model.losses: no 'featrue' is there: did you mean 'feature'? There is feature, relation (a new one "
     'needs a type)'),
    ('model.losses.featrue=None', "model.losses: no 'featrue' is there: did you mean 'feature'?"),
    ('model.teachers.clip.chekpoint=None', "model.teachers.clip: no 'chekpoint' is taken: did you mean 'checkpoint'?"),
    ('model.maskr.keep_rate=1', "model: no 'maskr' is taken: did you mean 'masker'?"),
    ('model.masker.scorer.type=mmhdistill.RandomScorer model.masker.scorer.k=1',
     "model.masker.scorer: no 'k' is taken: There is nothing"),
    ('model.backbone.drop_path_rat=0.1', "model.backbone: no 'drop_path_rat' is taken: did you mean 'drop_path_rate'?"),
    ('model.backbone.init_from.card=x model.backbone.init_from.chekpoint=None',
     "model.backbone.init_from: no 'chekpoint' is taken: did you mean 'checkpoint'?"),
    ('train_dataloader.batchsize=4', "train_dataloader: no 'batchsize' is taken: did you mean 'batch_size'?"),
    ('train_dataloader.dataset.strid=3', "train_dataloader.dataset: no 'strid' is taken: did you mean 'stride'?"),
    ('train_dataloader.dataset.pipeline.1.scal=3',
     "train_dataloader.dataset.pipeline.1: no 'scal' is taken: did you mean 'scale'?"),
    ('train_dataloader.dataset.pipeline.4.scale=3',
     "train_dataloader.dataset.pipeline is a list of 4, counted from 0: '4' is none of them; "
     'train_dataloader.dataset.pipeline._delete_=True drops what is there'),
    ('train_dataloader.dataset.pipeline.Flip.prob=3',
     "train_dataloader.dataset.pipeline is a list of 4, counted from 0: 'Flip' is none of them"),
    ('optim_wrapper.acumulative_counts=4', "optim_wrapper: no 'acumulative_counts' is taken: did you mean "
                                           "'accumulative_counts'?"),
    ('optim_wrapper.optimizer.wieght_decay=4', "optim_wrapper.optimizer: no 'wieght_decay' is taken: did you mean "
                                               "'weight_decay'?"),
    ('optim_wrapper.optimizer._delete_=True optim_wrapper.optimizer.type=SGD optim_wrapper.optimizer.momentun=0.9',
     "optim_wrapper.optimizer: no 'momentun' is taken: did you mean 'momentum'?"),
    ('train_cfg.max_epoch=4', "train_cfg: no 'max_epoch' is taken: did you mean 'max_epochs'?"),
    ('default_hooks.checkpont.interval=4', "default_hooks: no 'checkpont' is there: did you mean 'checkpoint'?"),
    ('default_hooks.sentinel.max_skip=4',
     "default_hooks.sentinel: no 'max_skip' is taken: did you mean 'max_skips'? There is max_skips"),
    ('default_hooks.sentinl.max_skips=4', "default_hooks: no 'sentinl' is there: did you mean 'sentinel'?"),
    ('randomness.sed=4', "randomness: no 'sed' is taken: did you mean 'seed'?"),
    ('custom_hooks.0.schedul=linear', "custom_hooks.0: no 'schedul' is taken: did you mean 'schedule'?"),
    ('work_dr=x', "no 'work_dr' is read: did you mean 'work_dir'?"),
    ('modle.masker=None', "no 'modle' is read: did you mean 'model'?"),
    ('model.masker.keep_rate.start=1',
     'model.masker.keep_rate is 0.7 in the config, which has no settings: set model.masker.keep_rate itself; '
     'model.masker.keep_rate._delete_=True drops what is there'),
    ("model.x'.y=1", '"\'" cannot be in the name of a setting'),
])
def test_merge_checked__options_that_lead_nowhere(text, problem, cfg):
    before = cfg.pretty_text
    with pytest.raises(ValueError) as caught:
        merge_checked(cfg, options_of(text))
    path = text.split(' ')[-1].split('=')[0]
    assert str(caught.value).startswith(
        f'the config has settings that nothing would read:\n--cfg-options {path}: {problem}')
    assert cfg.pretty_text == before


def test_merge_checked__all_problems_at_once(cfg):
    with pytest.raises(ValueError) as caught:
        merge_checked(cfg, options_of('work_dr=x model.masker.keep_rate=0.5 model.masker.keep_rat=0.5'))
    assert [line.split(': ')[0] for line in str(caught.value).splitlines()[1:]] == [
        '--cfg-options work_dr', '--cfg-options model.masker.keep_rat']


def test_merge_checked__type_that_is_not_there(cfg):
    with pytest.raises(ValueError, match="model.masker.scorer.type is 'mmhdistill.RandomScore', and no 'RandomScore' "
                                         "is registered: did you mean 'RandomScorer'"):
        merge_checked(cfg, {'model.masker.scorer.type': 'mmhdistill.RandomScore'})


def test_merge_checked__a_variable_of_the_config_is_told(cfg):
    with log_messages() as messages:
        merge_checked(cfg, {'train_pipeline.1.scale': 225, 'model.masker.keep_rate': 0.5})
    assert cfg.train_dataloader.dataset.pipeline[1].scale == 224
    message, = messages
    assert re.match(r'--cfg-options train_pipeline: a variable of \S+300e.py, which the Runner does not read', message)


@pytest.mark.parametrize('target, some, none', [
    (LinearProjector, {'in_channels', 'out_channels', 'init_cfg'}, {'self', 'kwargs'}),
    # Through **kwargs, over three classes.
    (TimmTeacher, {'model', 'checkpoint', 'model_args', 'image_size', 'input_mean'}, {'card', 'kwargs'}),
    (MaskableVisionTransformer, {'init_from', 'arch', 'out_type', 'drop_path_rate'}, {'args', 'kwargs'}),
])
def test_call_arguments__of_ours(target, some, none):
    found, is_open = config_guard._call_arguments(target)
    assert some <= found and not none & found and not is_open


def test_call_arguments__of_others():
    assert config_guard._call_arguments(nn.Linear) == (
        {'in_features', 'out_features', 'bias', 'device', 'dtype'}, False)
    # Those of the base class too, and what **kwargs may be besides.
    assert config_guard._call_arguments(AmpOptimWrapper) == (
        {'loss_scale', 'dtype', 'use_fsdp', 'optimizer', 'accumulative_counts', 'clip_grad'}, True)
    assert config_guard._call_arguments(nn.functional.gelu) == (set(), True)
