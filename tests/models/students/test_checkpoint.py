import pytest
import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS as MMPRETRAIN

from mmhdistill.models.students.checkpoint import read_student
from tests.helpers import build_distiller, log_messages

ARCH = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)


@pytest.fixture(scope='module')
def distiller():
    return build_distiller()


def save(path, tensors, **beside):
    torch.save(dict(state_dict=tensors, **beside), path)
    return path


def under(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def head(name):
    return {f'{name}.weight': torch.zeros(2, 2)}


@pytest.mark.parametrize('kind, count', [('a distiller', 1), ('a classifier', 1), ('a bare ViT', 0)])
def test_read_student__same_tensors_from_every_kind(tmp_path, distiller, kind, count):
    student = distiller.backbone.state_dict()
    tensors = {
        'a distiller': distiller.state_dict(),
        'a bare ViT': student,
        # A linear probe: its neck is a BatchNorm.
        'a classifier': {**under('backbone.', student), **head('head.fc'), **head('neck.bn')},
    }[kind]
    with log_messages() as log:
        read = read_student(save(tmp_path / 'file.pth', tensors, meta={}, optimizer={}))
    assert set(read) == set(student) and all(torch.equal(read[name], student[name]) for name in student)
    assert len(log) == 1 and f'checkpoint of {kind}: {len(student)} tensors' in log[0]
    assert log[0].count('left aside') == count


@pytest.mark.parametrize('extra, message', [
    (('rpn_head.conv', 'neck.convs'), r'a detector or segmentor \(it has rpn_head\)'),
    (('decode_head.conv', 'auxiliary_head.conv'), r'\(it has auxiliary_head, decode_head\)'),
    (('neck.mask_token', ), r'another pre-training method \(it has neck\)'),
    (('momentum_encoder.0', 'neck.fc0', 'head.predictor'), r'\(it has head, momentum_encoder, neck\)'),
])
def test_read_student__other_models_are_refused_by_name(tmp_path, distiller, extra, message):
    tensors = under('backbone.', distiller.backbone.state_dict())
    for name in extra:
        tensors.update(head(name))
    with pytest.raises(ValueError, match=message):
        read_student(save(tmp_path / 'file.pth', tensors))


def test_read_student__teachers_and_files_without_a_vit_are_refused(tmp_path):
    import timm
    teacher = timm.create_model('vit_tiny_patch16_224', depth=1).state_dict()
    with pytest.raises(ValueError, match='in timm format, as teachers do.*init_from'):
        read_student(save(tmp_path / 'teacher.pth', teacher))
    with pytest.raises(ValueError, match='in no known format.*A checkpoint of a distiller'):
        read_student(save(tmp_path / 'resnet.pth', {'conv1.weight': torch.zeros(1)}))


@pytest.mark.parametrize('library', ['mmpretrain', 'mmdet', 'mmseg'])
def test_scheme__any_project_starts_its_vit_from_a_distiller(tmp_path, distiller, library):
    """As the config of another project writes it, in its own scope."""
    from mmengine.registry import MODELS, DefaultScope
    save(tmp_path / 'epoch_1.pth', distiller.state_dict())
    cfg = Config(dict(type='mmpretrain.VisionTransformer', arch=ARCH, img_size=64, patch_size=8, out_type='featmap',
                      init_cfg=dict(type='Pretrained', checkpoint=f'mmhdistill:{tmp_path}/epoch_1.pth')))
    with DefaultScope.overwrite_default_scope(library):
        backbone = (MMPRETRAIN if library == 'mmpretrain' else MODELS).build(cfg)
        backbone.init_weights()
    student = distiller.backbone.state_dict()
    for name, x in backbone.state_dict().items():
        # 8 x 8 patches here, 4 x 4 there.
        assert x.shape == (1, 65, 32) if name == 'pos_embed' else torch.equal(x, student[name])
    assert torch.equal(backbone.pos_embed[:, :1], student['pos_embed'][:, :1])


def vit(**kwargs):
    return dict(type='mmpretrain.VisionTransformer', arch=ARCH, img_size=64, patch_size=8, **kwargs)


def start(tmp_path, distiller, **kwargs):
    path = save(tmp_path / 'epoch_1.pth', distiller.state_dict())
    backbone = MMPRETRAIN.build({
        **vit(), 'init_cfg': dict(type='Pretrained', checkpoint=f'mmhdistill:{path}'), **kwargs})
    backbone.init_weights()
    return backbone


@pytest.mark.parametrize('other, message', [
    (dict(arch={**ARCH, 'embed_dims': 64}), r'this VisionTransformer: \d+ tensors are of another shape '
                                            r'\(cls_token: \(1, 1, 32\) there, \(1, 1, 64\) here, pos_embed'),
    (dict(arch={**ARCH, 'feedforward_channels': 128}), r': 9 tensors are of another shape \(layers\.0\.ffn'),
    (dict(arch={**ARCH, 'num_layers': 4}), r': 12 tensors are missing \(layers\.3\.attn'),
    (dict(arch={**ARCH, 'num_layers': 2}), r': 12 tensors are unexpected \(layers\.2\.attn'),
    (dict(patch_size=16), r': 1 tensors are of another shape \(patch_embed.projection.weight: \(32, 3, 8, 8\) there'),
    (dict(pre_norm=True), r': 2 tensors are missing \(pre_norm'),
])
def test_start__of_another_architecture_is_refused(tmp_path, distiller, other, message):
    """mmengine alone warns, and goes on with random weights."""
    with pytest.raises(ValueError, match=message):
        start(tmp_path, distiller, **other)


@pytest.mark.parametrize('other, absent, new', [
    (dict(with_cls_token=False, out_type='featmap'), {'cls_token'}, set()),
    (dict(final_norm=False), {'ln1.weight', 'ln1.bias'}, set()),
    (dict(out_type='avg_featmap'), set(), {'ln2.weight', 'ln2.bias'}),
    (dict(type='mmhdistill.ViTDet', window_size=2), {'cls_token', 'ln1.weight', 'ln1.bias'},
     {f'layers.{layer}.attn.rel_pos_{axis}' for layer in range(3) for axis in 'hw'}),
])
def test_start__what_a_task_has_or_lacks_is_no_misfit(tmp_path, distiller, other, absent, new):
    student, tensors = distiller.backbone.state_dict(), start(tmp_path, distiller, **other).state_dict()
    assert student.keys() - tensors.keys() == absent and tensors.keys() - student.keys() == new
    assert all(torch.equal(tensors[name], student[name]) for name in student.keys() & tensors.keys() - {'pos_embed'})
    # 8 x 8 patches here, 4 x 4 there.
    patches = student['pos_embed'][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(patches, (8, 8), mode='bicubic').flatten(2).transpose(1, 2)
    torch.testing.assert_close(tensors['pos_embed'][:, -64:], want)


def test_start__of_other_files_is_left_to_mmengine(tmp_path, distiller):
    path = save(tmp_path / 'part.pth', {'cls_token': torch.full((1, 1, 32), 3.0)})
    backbone = MMPRETRAIN.build(vit(init_cfg=dict(type='Pretrained', checkpoint=str(path))))
    backbone.init_weights()
    assert (backbone.cls_token == 3).all()


def test_start__prefix_is_refused(tmp_path, distiller):
    init_cfg = dict(type='Pretrained', checkpoint=f'mmhdistill:{tmp_path}/epoch_1.pth', prefix='backbone.')
    with pytest.raises(ValueError, match="leave prefix='backbone.' out"):
        start(tmp_path, distiller, init_cfg=init_cfg)


def test_start__of_another_number_of_heads_is_refused_where_the_file_tells(tmp_path, distiller):
    text = Config(dict(model=dict(backbone=dict(arch=ARCH)))).pretty_text
    path = save(tmp_path / 'heads.pth', distiller.state_dict(), meta=dict(cfg=text))
    init_cfg = dict(type='Pretrained', checkpoint=f'mmhdistill:{path}')
    with pytest.raises(ValueError, match='heads.pth has 4 heads, and this VisionTransformer 8: give arch as'):
        start(tmp_path, distiller, init_cfg=init_cfg, arch={**ARCH, 'num_heads': 8})
    start(tmp_path, distiller, init_cfg=init_cfg)
    # mmpretrain's names: deit-tiny has 3.
    text = Config(dict(model=dict(backbone=dict(arch='deit-tiny')))).pretty_text
    save(path, distiller.state_dict(), meta=dict(cfg=text))
    with pytest.raises(ValueError, match='has 3 heads, and this VisionTransformer 4'):
        start(tmp_path, distiller, init_cfg=init_cfg)


def test_start__keeps_teachers_and_normalisation_of_the_student(tmp_path, distiller):
    path = save(tmp_path / 'taught.pth', distiller.state_dict(), teachers=dict(clip=dict(licence='MIT')))
    init_cfg = dict(type='Pretrained', checkpoint=f'mmhdistill:{path}')
    found = start(tmp_path, distiller, init_cfg=init_cfg).started_from
    assert found == dict(file=str(path), teachers=dict(clip=dict(licence='MIT')), data_preprocessor={})
    text = Config(dict(model=dict(data_preprocessor=dict(mean=[1, 2, 3])))).pretty_text
    save(path, distiller.state_dict(), meta=dict(cfg=text))
    found = start(tmp_path, distiller, init_cfg=init_cfg).started_from
    assert found == dict(file=str(path), teachers={}, data_preprocessor=dict(mean=[1, 2, 3]))


def test_start__in_a_config_with_the_class_itself(tmp_path, distiller):
    """As mmengine's configs in Python style name it."""
    path = save(tmp_path / 'epoch_2.pth', distiller.state_dict())
    init_cfg = dict(type=PretrainedInit, checkpoint=f'mmhdistill:{path}')
    assert torch.equal(start(tmp_path, distiller, init_cfg=init_cfg).cls_token, distiller.backbone.cls_token)
    with pytest.raises(ValueError, match='of another shape'):
        start(tmp_path, distiller, init_cfg=init_cfg, arch={**ARCH, 'embed_dims': 64})


def test_start__without_the_scheme_is_told_rather_than_left_random(tmp_path, distiller):
    path = save(tmp_path / 'epoch_3.pth', distiller.state_dict())
    with pytest.raises(ValueError, match="is one of VisionTransformer: .*write checkpoint='mmhdistill:.*epoch_3.pth"):
        start(tmp_path, distiller, init_cfg=dict(type='Pretrained', checkpoint=str(path)))


@pytest.mark.parametrize('kind', ['VisionTransformer', 'MAE', 'BEiT'])
def test_scheme__vits_of_mmseg_are_refused(tmp_path, distiller, kind):
    """They load files by themselves, and have other parameters."""
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS
    path = save(tmp_path / 'epoch_4.pth', distiller.state_dict())
    vit = MODELS.build(dict(type=kind, img_size=(32, 32), patch_size=8, embed_dims=32, num_layers=3, num_heads=4,
                            init_cfg=dict(type='Pretrained', checkpoint=f'mmhdistill:{path}')))
    with pytest.raises(ValueError, match="is what a ViT of mmpretrain or mmhdistill starts from.*such as mmseg's"):
        vit.init_weights()


def test_scheme__load_from_is_refused(tmp_path, distiller):
    path = save(tmp_path / 'epoch_5.pth', distiller.state_dict())
    with pytest.raises(ValueError, match="load_from takes the file itself, without 'mmhdistill:'"):
        load_checkpoint(torch.nn.Linear(1, 1), f'mmhdistill:{path}')


def test_read_student__saved_in_a_wrapper(tmp_path, distiller):
    read = read_student(save(tmp_path / 'ddp.pth', under('module.', distiller.state_dict())))
    assert read.keys() == distiller.backbone.state_dict().keys()


def test_read_student__of_a_run_that_diverged_is_refused(tmp_path, distiller):
    tensors = {name: x.clone() for name, x in distiller.state_dict().items()}
    tensors['backbone.ln1.bias'][3] = float('nan')
    with pytest.raises(ValueError, match=r'not finite \(ln1.bias\): its run diverged'):
        read_student(save(tmp_path / 'nan.pth', tensors))
