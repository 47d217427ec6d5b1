import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmhdistill.models import ViTDet
from mmhdistill.registry import MODELS
from tests.helpers import log_messages, spawn

ARCH = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32)


def vit(**kwargs):
    return MODELS.build(dict(type='mmpretrain.VisionTransformer', arch=ARCH, img_size=32, patch_size=16, **kwargs))


class Detector(nn.Module):
    """A ViT somewhere inside, and a head."""

    def __init__(self, backbone=None):
        super().__init__()
        self.inner = nn.Module()
        self.inner.backbone = backbone or vit()
        self.head = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))


def build(model, lr=0.1, weight_decay=0.05, **paramwise):
    return build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=lr, weight_decay=weight_decay),
        constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
        paramwise_cfg={**dict(layer_decay_rate=0.5), **paramwise})).optimizer


def settings(model, optimizer):
    """Name of a parameter -> (lr, weight decay)."""
    of = {id(p): (group['lr'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']}
    assert len(of) == sum(len(group['params']) for group in optimizer.param_groups)
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def check_rates(model, optimizer):
    found = settings(model, optimizer)
    assert set(found) == {name for name, _ in model.named_parameters()}
    # L = 3: lr 0.1 * 0.5 ** (4 - layer).
    expected = {'cls_token': 0.1 / 16, 'pos_embed': 0.1 / 16, 'patch_embed': 0.1 / 16, 'layers.0': 0.1 / 8,
                'layers.1': 0.1 / 4, 'layers.2': 0.1 / 2, 'ln1': 0.1}
    for name, (lr, _) in found.items():
        inner = name.removeprefix('inner.backbone.')
        key = next((key for key in expected if inner.startswith(key)), None) if inner != name else None
        assert lr == pytest.approx(expected[key] if key else 0.1, rel=1e-12), name


def test_rates__are_lr_times_decay_to_the_layers_above():
    model = Detector()
    check_rates(model, build(model))


def rates_in_ddp(rank: int) -> None:
    model = Detector()
    check_rates(model, build(MMDistributedDataParallel(model)))


def test_rates__of_a_model_wrapped_in_ddp(tmp_path):
    spawn(rates_in_ddp, tmp_path)


def test_weight_decay__is_of_matrices_and_kernels_alone():
    model = Detector(ViTDet(ARCH, img_size=32, patch_size=16, layer_scale_init_value=1e-5, pre_norm=True))
    found = settings(model, build(model))
    decayed = {name for name, (_, weight_decay) in found.items() if weight_decay == 0.05}
    assert {weight_decay for _, weight_decay in found.values()} == {0.0, 0.05}
    kinds = ('attn.qkv.weight', 'attn.proj.weight', 'ffn.layers.0.0.weight', 'ffn.layers.1.weight')
    assert decayed == {'head.0.weight', 'inner.backbone.patch_embed.projection.weight',
                       *(f'inner.backbone.layers.{i}.{kind}' for i in range(3) for kind in kinds)}
    assert found['inner.backbone.pre_norm.weight'][0] == 0.1 / 16


def test_distillation_token__is_in_the_first_layer_and_does_not_decay():
    model = Detector(MODELS.build(dict(
        type='mmpretrain.DistilledVisionTransformer', arch=ARCH, img_size=32, patch_size=16)))
    found = settings(model, build(model))
    for token in ('dist_token', 'cls_token', 'pos_embed'):
        assert found[f'inner.backbone.{token}'] == (0.1 / 16, 0.0)


def test_custom_keys__multiply_and_the_longest_counts():
    model = Detector()
    found = settings(model, build(model, custom_keys={'head': dict(lr_mult=10), 'head.1': dict(lr_mult=2),
                                                      'layers.1': dict(lr_mult=3, decay_mult=0.5)}))
    assert found['head.0.weight'] == (1.0, 0.05) and found['head.1.weight'] == (0.2, 0.0)
    assert found['inner.backbone.layers.1.attn.qkv.weight'] == (pytest.approx(0.1 / 4 * 3), 0.025)


def test_frozen_parameters__are_left_out():
    model = Detector(vit(frozen_stages=1))
    found = settings(model, build(model))
    assert not any('backbone.layers.0' in name or 'pos_embed' in name for name in found)
    assert 'inner.backbone.layers.1.ln1.weight' in found


def test_one_step__moves_each_layer_by_its_rate():
    model = Detector()
    optimizer = build(model, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # The first step of Adam is its learning rate.
    for name, (lr, _) in settings(model, optimizer).items():
        assert torch.allclose(before[name] - dict(model.named_parameters())[name], torch.tensor(lr), atol=1e-6)


def test_table__is_logged_once():
    with log_messages() as log:
        build(Detector())
    tables = [message for message in log if 'learning rate by layer' in message]
    assert len(tables) == 1
    rows = [line.split() for line in tables[0].splitlines()[2:]]
    assert ['inner.backbone.0', '0.00625', '0', '3'] in rows and ['inner.backbone.0', '0.00625', '0.05', '1'] in rows
    assert rows[-1][:3] == ['rest', '0.1', '0.05'] and sum(int(row[-1]) for row in rows) == len(
        list(Detector().parameters()))


@pytest.mark.parametrize('model, options, message', [
    (nn.Linear(2, 2), {}, 'holds no VisionTransformer'),
    (Detector(), dict(layer_decay_rate=1.5), r'give a rate in \(0, 1\]'),
    (Detector(), dict(norm_decay_mult=0.0), "'norm_decay_mult'.*does not know"),
    (Detector(), dict(lr=None), 'give optimizer an lr'),
])
def test_bad_settings__are_told(model, options, message):
    if 'lr' in options:
        with pytest.raises(ValueError, match=message):
            build_optim_wrapper(model, dict(
                optimizer=dict(type='AdamW'), constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
                paramwise_cfg=dict(layer_decay_rate=0.5)))
    else:
        with pytest.raises(ValueError, match=message):
            build(model, **options)
