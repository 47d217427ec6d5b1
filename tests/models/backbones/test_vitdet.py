import pytest
import torch
from mmpretrain.models.backbones import VisionTransformer

from mmhdistill.models import ViTDet
from tests.helpers import build_distiller, log_messages, random_images, randomise

ARCH = dict(embed_dims=32, num_layers=4, num_heads=4, feedforward_channels=64)


def vitdet(**kwargs):
    torch.manual_seed(0)
    model = ViTDet(**{**dict(arch=ARCH, img_size=48, patch_size=8, window_size=3), **kwargs})
    model.init_weights()
    return model.eval()


def plain(**kwargs):
    torch.manual_seed(1)
    model = VisionTransformer(**{**dict(arch=ARCH, img_size=48, patch_size=8, out_type='featmap', with_cls_token=False),
                                 **kwargs})
    model.init_weights()
    model.eval()
    return randomise(model)


@pytest.mark.parametrize('final_norm', [False, True])
@pytest.mark.parametrize('rel_pos', [False, True])
def test_windows_of_the_whole_grid__equal_the_plain_vit(final_norm, rel_pos):
    reference = plain(final_norm=final_norm)
    images = random_images(2, 48)
    for global_blocks, windows in (([], [6] * 4), ([0, 1, 2, 3], [None] * 4)):
        # Relative positions start at zero.
        model = vitdet(window_size=6, global_blocks=global_blocks, final_norm=final_norm, rel_pos=rel_pos)
        model.load_state_dict(reference.state_dict(), strict=True)
        assert model.windows == windows
        assert (model(images)[0] - reference(images)[0]).abs().max() < 1e-5


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('rel_pos', [False, True])
@pytest.mark.parametrize('options', [
    dict(layer_scale_init_value=0.5), dict(pre_norm=True), dict(drop_rate=0.3), dict(drop_path_rate=0.6),
    dict(layer_cfgs=dict(attn_drop_rate=0.3))
], ids=lambda options: next(iter(options)))
def test_options_of_the_base_class__compute_what_the_plain_vit_computes(options, rel_pos, with_cp):
    """In training too: the same numbers are drawn in the same order."""
    reference = plain(final_norm=False, **options)
    model = vitdet(window_size=6, global_blocks=[1], rel_pos=rel_pos, with_cp=with_cp, **options)
    model.load_state_dict(reference.state_dict())
    assert model.windows == [6, None, 6, 6]
    images, outs = random_images(4, 48), []
    for vit in (reference, model):
        torch.manual_seed(3)
        vit.train()
        outs.append(vit(images)[0])
        outs[-1].square().sum().backward()
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all((p.grad - grads[name]).abs().max() < 1e-4 * p.grad.abs().max() for name, p in
               reference.named_parameters())
    assert ((model.eval()(images)[0] - outs[1]).abs().max() > 1e-3) == ('drop' in str(options))


def test_windows__a_pixel_reaches_its_own_window_alone_until_a_global_block():
    images = random_images(1, 48)
    changed = images.clone()
    changed[..., :8, :8] += 1
    for global_blocks, expected in (([], 9), ([3], 36)):
        model = randomise(vitdet(global_blocks=global_blocks))
        difference = (model(images)[0] - model(changed)[0]).abs().amax(dim=1)[0]
        assert (difference > 1e-6).sum() == expected
        assert (difference[:3, :3] > 1e-6).all()


def test_padding__changes_nothing_inside():
    # 5 x 4 patches in windows of 3: those of the last row and column hold 2 x 3, 3 x 1 and 2 x 1.
    model = randomise(vitdet(img_size=(40, 32), global_blocks=[], rel_pos=False))
    images = random_images(2, 40)[..., :32]
    whole = model(images)[0]
    assert whole.shape == (2, 32, 5, 4)
    # The last window alone, as an image, with the positions that it had.
    positions = model.pos_embed.unflatten(1, (5, 4))[:, 3:, 3:].flatten(1, 2)
    corner = vitdet(img_size=(16, 8), window_size=2, rel_pos=False)
    corner.load_state_dict({**model.state_dict(), 'pos_embed': positions})
    assert (corner(images[..., 24:, 24:])[0] - whole[..., 3:, 3:]).abs().max() < 1e-5


@pytest.mark.parametrize('size', [(48, 48), (40, 64), (8, 8)])
def test_any_size__with_positions_and_tables_resampled(size):
    model = randomise(vitdet())
    out, = model(random_images(2, 64)[..., :size[0], :size[1]])
    assert out.shape == (2, 32, size[0] // 8, size[1] // 8) and torch.isfinite(out).all()


def test_recomputing_blocks__happens_and_changes_no_gradient():
    grads = []
    for with_cp in (False, True):
        model = randomise(vitdet(global_blocks=[3], with_cp=with_cp)).train()
        calls = []
        for index, block in enumerate(model.layers):
            block.ln1.register_forward_hook(lambda *_, calls=calls, index=index: calls.append(index))
        model(random_images(2, 48))[0].square().sum().backward()
        # Backwards, each block once more.
        assert calls == [0, 1, 2, 3, *([3, 2, 1, 0] if with_cp else [])]
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.abs().sum() > 0 for g in grads[0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads))


def test_student_checkpoint__loads_strictly_and_says_what_is_new(tmp_path):
    distiller = build_distiller()
    torch.save(dict(state_dict=distiller.state_dict()), tmp_path / 'epoch_1.pth')
    arch = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
    model = ViTDet(arch, img_size=32, patch_size=8, window_size=2, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'epoch_1.pth'), prefix='backbone.'))
    with log_messages() as log:
        model.init_weights()
    student = distiller.backbone.state_dict()
    for name, tensor in model.state_dict().items():
        if name == 'pos_embed':
            assert torch.equal(tensor, student[name][:, 1:])
        elif 'rel_pos' in name:
            assert not tensor.any()
        else:
            assert torch.equal(tensor, student[name])
    text = '\n'.join(log)
    assert 'dropped: cls_token, ln1.bias, ln1.weight;' in text and 'layers.2.attn.rel_pos_w' in text


def test_position_embedding__is_resampled_to_the_size_of_training():
    student, model = plain(with_cls_token=True), vitdet(img_size=96)
    model.load_state_dict(student.state_dict())
    expected = torch.nn.functional.interpolate(
        student.pos_embed[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2), (12, 12), mode='bicubic')
    assert torch.allclose(model.pos_embed.unflatten(1, (12, 12)).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize('with_cls_token, img_size, patches', [
    (True, (24, 40), 15),  # 16 with the class token, a square
    (False, (16, 40), 10),  # 9 more one
    (False, (48, 24), 18)
])
def test_position_embedding__of_an_image_that_is_not_square(with_cls_token, img_size, patches):
    student = plain(with_cls_token=with_cls_token, img_size=img_size)
    weights = student.state_dict()
    message = (rf'positions of {patches} patches, which are not those of a square .*: give img_size as they were '
               r'trained with, and not \(96, 64\), whose 12x8 patches are 96')
    with pytest.raises(ValueError, match=message):
        vitdet(img_size=(96, 64)).load_state_dict(weights)
    model = vitdet(img_size=img_size)
    model.load_state_dict(weights)
    assert torch.equal(model.pos_embed, student.pos_embed[:, int(with_cls_token):])


@pytest.mark.parametrize('size', [(64, 64), (32, 32), (48, 80)])
@pytest.mark.parametrize('window', [3, 6])  # 6 is the side of the grid
def test_own_checkpoint__at_another_size_is_the_model_fed_that_size(size, window):
    original = randomise(vitdet(global_blocks=[1, 3], window_size=window))
    model = vitdet(global_blocks=[1, 3], window_size=window, img_size=size)
    model.load_state_dict(original.state_dict())
    # Windows stay as they are.
    lengths = [len(block.attn.rel_pos_w) for block in model.layers]
    assert lengths == [2 * window - 1, 2 * size[1] // 8 - 1] * 2
    images = random_images(2, 80)[..., :size[0], :size[1]]
    assert (model(images)[0] - original(images)[0]).abs().max() < 1e-5
    assert all(torch.equal(x, original.state_dict()[name]) for name, x in model.state_dict().items()
               if 'rel_pos' in name and int(name.split('.')[1]) in (0, 2))


@pytest.mark.parametrize('theirs, ours', [
    (dict(global_blocks=[3]), dict(global_blocks=[2, 3])),  # a window's table is none of a whole image's
    (dict(global_blocks=[3]), dict(global_blocks=[])),
    (dict(window_size=3), dict(window_size=2))
])
def test_own_checkpoint__of_other_windows_is_refused(theirs, ours):
    original = vitdet(**{**dict(global_blocks=[3]), **theirs})
    for img_size in (48, 64):
        with pytest.raises(ValueError, match=r'of another shape \(layers\.\d\.attn\.rel_pos_h'):
            vitdet(**{**dict(global_blocks=[3]), **ours}, img_size=img_size).load_state_dict(original.state_dict())


def test_own_checkpoint__loads_with_its_relative_positions():
    one, two = randomise(vitdet()), vitdet()
    two.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_weights_of_another_model__are_refused_by_name():
    weights = plain(arch={**ARCH, 'num_layers': 3}).state_dict()
    with pytest.raises(ValueError, match=r'12 tensors are missing \(layers\.3\.'):
        vitdet().load_state_dict(weights)
    with pytest.raises(ValueError, match=r'unexpected \(conv1\.weight'):
        vitdet().load_state_dict({**plain().state_dict(), 'conv1.weight': torch.zeros(1)})


def test_frozen_stages__stay_in_eval_mode_and_get_no_gradient():
    model = vitdet(frozen_stages=2, drop_path_rate=0.3, drop_rate=0.1).train()
    assert [block.training for block in model.layers] == [False, False, True, True]
    assert not model.patch_embed.training and not model.drop_after_pos.training
    model(random_images(1, 48))[0].sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert 'pos_embed' in frozen and 'layers.1.attn.rel_pos_h' in frozen and 'layers.2.attn.rel_pos_h' not in frozen


def test_bad_arguments__are_told():
    with pytest.raises(ValueError, match='counted from 0 to 3'):
        vitdet(global_blocks=[4])
    for img_size in (4, 50, (48, 50)):
        with pytest.raises(ValueError, match=r'cannot be cut into patches of 8x8: give a multiple'):
            vitdet(img_size=img_size)
    with pytest.raises(ValueError, match='multiple of the patch size'):
        vitdet()(random_images(1, 50))
