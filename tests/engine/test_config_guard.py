import re
from pathlib import Path

import pytest
from mmcv.transforms import RandomChoiceResize
from mmengine.config import Config, DictAction
from torch import nn

from mmhdistill.engine import config_guard
from mmhdistill.engine.config_guard import component_problems, merge_checked
from mmhdistill.models import LinearProjector, MaskableVisionTransformer, TimmTeacher
from mmhdistill.models.maskers import RandomScorer
from tests.helpers import log_messages, tiny_distiller

ROOT = Path(__file__).parents[2]
HYBRID = ROOT / 'configs/hdistill/vit-b_clip-mae_300e.py'
CONFIGS = [*(ROOT / 'configs').rglob('*.py'), *ROOT.glob('studies/*/[cg]pu/*.py')]
FOLDERS = sorted({str(path.parent.relative_to(ROOT)) for path in CONFIGS})


@pytest.fixture
def cfg():
    return Config.fromfile(HYBRID)


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
     "'HybridDistiller'? There is CLSAttentionScorer, CPUAmpOptimWrapper, "),
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
    dict(custom_hooks=[dict(type='mmhdistill.DataCheck', priority='LOW')]),
    dict(optim_wrapper=dict(type='mmhdistill.auto_amp_optim_wrapper', constructor='X', paramwise_cfg=dict(anything=1),
                            accumulative_counts=4, clip_grad=dict(max_norm=1), optimizer=dict(type='AdamW'))),
    dict(data=[[dict(type='mmhdistill.ImageFolder', data_root='x', pipeline=[], metainfo=dict(free=1), indices=3)]]),
    # Components of others are theirs to check.
    dict(model=dict(type='mmpretrain.VisionTransformer', nonsense=1)),
])
def test_component_problems__leaves_what_is_legitimate(settings):
    assert component_problems(Config(settings)) == []


def options_of(text):
    return {key: DictAction._parse_iterable(value) for key, value in (word.split('=', 1) for word in text.split(' '))}


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
    'visualizer.vis_backends.0.type=TensorboardVisBackend', 'compile.mode=default'
])
def test_merge_checked__options_that_are_right(text, cfg):
    options = options_of(text)
    merge_checked(cfg, options)
    for path, value in options.items():
        node = cfg
        for key in path.split('.'):
            node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
        assert node == value


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
     "train_dataloader.dataset.pipeline is a list of 4, counted from 0: '4' is none of them"),
    ('train_dataloader.dataset.pipeline.Flip.prob=3',
     "train_dataloader.dataset.pipeline is a list of 4, counted from 0: 'Flip' is none of them"),
    ('optim_wrapper.acumulative_counts=4', "optim_wrapper: no 'acumulative_counts' is taken: did you mean "
                                           "'accumulative_counts'?"),
    ('optim_wrapper.optimizer.wieght_decay=4', "optim_wrapper.optimizer: no 'wieght_decay' is taken: did you mean "
                                               "'weight_decay'?"),
    ('optim_wrapper.paramwise_cfg.norm_decay_mlt=0', "optim_wrapper.paramwise_cfg: no 'norm_decay_mlt' is there: did "
                                                     "you mean 'norm_decay_mult'?"),
    ('train_cfg.max_epoch=4', "train_cfg: no 'max_epoch' is taken: did you mean 'max_epochs'?"),
    ('default_hooks.checkpont.interval=4', "default_hooks: no 'checkpont' is there: did you mean 'checkpoint'?"),
    ('default_hooks.sentinel.max_skip=4',
     "default_hooks.sentinel: no 'max_skip' is taken: did you mean 'max_skips'? There is max_skips"),
    ('default_hooks.sentinl.max_skips=4', "default_hooks: no 'sentinl' is there: did you mean 'sentinel'?"),
    ('randomness.sed=4', "randomness: no 'sed' is taken: did you mean 'seed'?"),
    ('custom_hooks.0.schedul=linear', "custom_hooks.0: no 'schedul' is taken: did you mean 'schedule'?"),
    ('work_dr=x', "no 'work_dr' is read: did you mean 'work_dir'?"),
    ('modle.masker=None', "no 'modle' is read: did you mean 'model'?"),
    ('model.masker.keep_rate.start=1', 'model.masker.keep_rate is 0.7 in the config, which has no settings'),
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
    found = config_guard._call_arguments(target)
    assert some <= found and not none & found


def test_call_arguments__of_others():
    assert config_guard._call_arguments(nn.Linear) == {
        'in_features', 'out_features', 'bias', 'device', 'dtype'}
    # **kwargs that the class itself uses.
    assert config_guard._call_arguments(RandomChoiceResize) is None
