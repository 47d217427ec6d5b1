import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models.utils import LayerNorm2d

from mmhdistill.models import DeconvPyramid, SimpleFPN
from tests.helpers import randomise


def maps(number=1, channels=8, grid=(4, 6), batch=2):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, channels, *grid, generator=generator) for _ in range(number))


def deconvolution(x, module):
    """Stride equals kernel, so each patch of 2 x 2 is a linear map of the pixel below it."""
    patches = torch.einsum('bchw,coij->bohiwj', x, module.weight) + module.bias[:, None, None, None, None]
    return patches.flatten(4, 5).flatten(2, 3)


def layer_norm(x, module):
    """Over channels, at each place on its own."""
    centred = x - x.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return normed * module.weight[:, None, None] + module.bias[:, None, None]


@pytest.mark.parametrize('neck, norms', [(DeconvPyramid(8), 1), (SimpleFPN(8, 4), 9)])
def test_norms__of_features_that_hardly_vary(neck, norms):
    """A variance of 1e-6 is halved by the eps of 1e-6."""
    found = [module for module in neck.modules() if isinstance(module, LayerNorm2d)]
    assert len(found) == norms
    for norm in found:
        signs = torch.tensor([1e-3, -1e-3]).repeat(norm.normalized_shape[0] // 2)[None, :, None, None]
        torch.testing.assert_close(norm(signs), signs * 1e3 / 2**0.5, rtol=1e-4, atol=0)


def test_deconv_pyramid__four_strides_of_one_width():
    outs = DeconvPyramid(8)(maps(4))
    assert [tuple(x.shape) for x in outs] == [(2, 8, 16, 24), (2, 8, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]


def test_deconv_pyramid__equals_its_closed_forms():
    inputs, neck = maps(4), randomise(DeconvPyramid(8))
    first, second, third, fourth = neck(inputs)
    up, norm, gelu, again = neck.scales[0]
    expected = deconvolution(F.gelu(layer_norm(deconvolution(inputs[0], up), norm)), again)
    assert isinstance(gelu, torch.nn.GELU) and (first - expected).abs().max() < 1e-5
    assert (second - deconvolution(inputs[1], neck.scales[1])).abs().max() < 1e-5
    # The map of a patch's own stride is the input itself, and the coarsest the maximum of 2 x 2.
    assert third is inputs[2]
    assert torch.equal(fourth, inputs[3].unflatten(3, (3, 2)).unflatten(2, (2, 2)).amax(dim=(3, 5)))


def test_deconv_pyramid__each_map_is_of_its_own_input():
    inputs = tuple(x.requires_grad_() for x in maps(4))
    for level, out in enumerate(DeconvPyramid(8)(inputs)):
        grads = torch.autograd.grad(out.sum(), inputs, allow_unused=True)
        assert [index for index, grad in enumerate(grads) if grad is not None] == [level]


@pytest.mark.parametrize('neck, number', [(DeconvPyramid(8), 4), (SimpleFPN(8, 4), 1)])
def test_gradients_reach_every_parameter_and_input(neck, number):
    neck, inputs = randomise(neck), tuple(x.requires_grad_() for x in maps(number))
    sum((out * torch.randn_like(out)).sum() for out in neck(inputs)).backward()
    assert all(x.grad.any() and torch.isfinite(x.grad).all() for x in (*inputs, *neck.parameters()))


@pytest.mark.parametrize('number', [1, 5])
def test_deconv_pyramid__another_number_of_maps_is_told(number):
    with pytest.raises(ValueError, match=f'4 maps of the ViT are expected, got {number}: give the backbone 4 out_'):
        DeconvPyramid(8)(maps(number))


@pytest.mark.parametrize('num_outs', [4, 5, 6])
def test_simple_fpn__strides_widths_and_number_of_maps(num_outs):
    outs = SimpleFPN(8, out_channels=5, num_outs=num_outs)(maps(grid=(4, 8)))
    shapes = [(2, 5, 16, 32), (2, 5, 8, 16), (2, 5, 4, 8), (2, 5, 2, 4), (2, 5, 1, 2), (2, 5, 1, 1)]
    assert [tuple(x.shape) for x in outs] == shapes[:num_outs]


def test_simple_fpn__equals_its_closed_forms():
    x, neck = maps()[0], randomise(SimpleFPN(8, out_channels=5, num_outs=5))
    up, norm, _, again = neck.scales[0]
    assert (up.out_channels, again.out_channels, neck.scales[1].out_channels) == (4, 2, 4)
    scaled = [deconvolution(F.gelu(layer_norm(deconvolution(x, up), norm)), again),
              deconvolution(x, neck.scales[1]), x, x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).amax(dim=(3, 5))]
    outs = neck((x, ))
    for scale, (one, first, three, second), out in zip(scaled, neck.convs, outs):
        y = layer_norm(torch.einsum('bchw,oc->bohw', scale, one.weight[:, :, 0, 0]), first)
        windows = F.unfold(y, 3, padding=1).unflatten(2, y.shape[2:])
        y = layer_norm(torch.einsum('bkhw,ok->bohw', windows, three.weight.flatten(1)), second)
        assert (out - y).abs().max() < 1e-4
    # A further map is every second place of the one before.
    assert torch.equal(outs[4], outs[3][..., ::2, ::2])


def test_simple_fpn__is_of_the_last_map():
    neck, (x, ), others = SimpleFPN(8, 4), maps(), maps(3)
    assert all(torch.equal(a, b) for a, b in zip(neck((x, )), neck((*others[1:], x))))


def test_simple_fpn__fewer_than_four_maps_are_told():
    with pytest.raises(ValueError, match='num_outs=3: the pyramid has at least 4 maps'):
        SimpleFPN(8, num_outs=3)


def test_pyramids__norms_need_no_batch():
    """One image alone gives what it gives among others, in training too."""
    for neck, inputs in ((DeconvPyramid(8), maps(4)), (SimpleFPN(8, 4), maps())):
        neck = randomise(neck).train()
        for whole, alone in zip(neck(inputs), neck(tuple(x[:1] for x in inputs))):
            assert (whole[:1] - alone).abs().max() < 1e-5
