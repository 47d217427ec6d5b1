"""Native models with random weights, what they compute, and the comparison with a teacher loaded from their file."""
import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhdistill.models.teachers import CARDS, TeacherCard, ViTTeacher

DEPTH = 3
TOLERANCE = 1e-5
_QKV = frozenset('qkv')
TAPS = {0: _QKV, 1: _QKV, 2: _QKV | {'hidden', 'features'}}
# Neither square nor of the native number of patches, and smaller than every native grid in its rows.
OBLONG = (5, 9)

# A module of a native block, and how q, k, v (or a part of them) follow from its output.
Projection = tuple[nn.Module, Callable[[Tensor], Tensor]]


def disturb(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random: no bias, norm, factor, token or position is left at what it starts from.

    Patches and positions come out small, so that a norm's eps shows: at a variance of 0.003, 1e-5 instead of 1e-6
    changes its output by 1e-3.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if 'pos' in name or parameter.dim() == 3 or 'patch' in name and parameter.dim() == 1:
                parameter.copy_(noise * 0.05)
            elif parameter.dim() == 4:
                parameter.copy_(noise * 0.05 * parameter[0].numel()**-0.5)
            elif parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1]**-0.5)
            else:
                parameter.copy_(parameter.mean().round() + 0.2 * noise if parameter.dim() else 0.2 * noise)
    return module.eval()


def small_card(name: str, embed_dims: int, num_heads: int) -> TeacherCard:
    """A shipped card at a small width: its flags are what is tested."""
    return dataclasses.replace(CARDS[name], embed_dims=embed_dims, depth=DEPTH, num_heads=num_heads)


def load(card: TeacherCard, path, **kwargs) -> ViTTeacher:
    """A teacher of images in 0-1."""
    teacher = ViTTeacher(card, str(path), input_mean=[0.0] * 3, input_std=[255.0] * 3, **kwargs)
    teacher.load()
    return teacher


def images(grid: tuple[int, int], patch_size: int, batch: int = 1) -> Tensor:
    """Noise in 0-1, not normalised."""
    height, width = (side * patch_size for side in grid)
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def normalise(x: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """As the native library does, with its own numbers."""
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (mean, std))
    return (x - mean) / std


@torch.no_grad()
def native_taps(run: Callable[[], object], blocks: Iterable[nn.Module], norm: nn.Module,
                project: Callable[[nn.Module], list[Projection]]) -> dict[tuple[int, str], Tensor]:
    """What a native model computes in ``run()``, by hooks on its own modules."""
    taps, handles = {}, []
    for index, block in enumerate(blocks):
        parts = []
        for module, projected in project(block):
            handles.append(module.register_forward_hook(
                lambda _, __, out, parts=parts, projected=projected: parts.append(projected(out))))

        def after(_, __, out, index=index, parts=parts):
            taps.update({(index, kind): x for kind, x in zip('qkv', torch.cat(parts, dim=-1).chunk(3, dim=-1))})
            taps[index, 'hidden'] = out[0] if isinstance(out, tuple) else out

        handles.append(block.register_forward_hook(after))
    run()
    for handle in handles:
        handle.remove()
    taps[DEPTH - 1, 'features'] = norm(taps[DEPTH - 1, 'hidden'])
    return {(layer, kind): taps[layer, kind] for layer, kinds in TAPS.items() for kind in kinds}


def timm_taps(model: nn.Module, x: Tensor) -> dict[tuple[int, str], Tensor]:
    return native_taps(lambda: model.forward_features(x), model.blocks, model.norm,
                       lambda block: [(block.attn.qkv, lambda out: out)])


def multi_head_taps(visual: nn.Module, x: Tensor) -> dict[tuple[int, str], Tensor]:
    """Of OpenAI's and open_clip's visual tower, whose ``nn.MultiheadAttention`` projects inside."""
    return native_taps(
        lambda: visual(x), visual.transformer.resblocks, visual.ln_post,
        lambda block: [(block.ln_1, lambda y: F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias))])


def error(teacher: ViTTeacher, native: dict[tuple[int, str], Tensor], x: Tensor, grid: tuple[int, int]) -> float:
    """Largest difference, relative to the largest value, over all taps, extra tokens and patches apart."""
    output = teacher(x, grid, TAPS)
    assert output.grid == grid
    assert set(output.taps) == set(native)
    largest = 0.0
    for key, expected in native.items():
        extra = teacher.card.num_extra_tokens
        assert output.taps[key].shape == expected.shape
        assert expected.shape[1] == extra + grid[0] * grid[1]
        for ours, theirs in ((output.extra(*key), expected[:, :extra]), (output.patches(*key), expected[:, extra:])):
            if theirs.numel():
                # Tokens that were all alike would show nothing.
                assert theirs.std() > 0.01
                largest = max(largest, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return largest


def resize(positions: Tensor, slots: int, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Positions (1, slots + n, C) with ``rule`` applied to the image (1, C, h, w) of those of the patches."""
    patches = positions[:, slots:]
    side = round(patches.shape[1]**0.5)
    image = rule(patches.reshape(1, side, side, -1).permute(0, 3, 1, 2))
    return torch.cat([positions[:, :slots], image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def mae_rule(grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """mae/util/pos_embed.py; DeiT's main.py."""
    return lambda image: F.interpolate(image, size=grid, mode='bicubic', align_corners=False)


def dino_rule(grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """dino/vision_transformer.py and dinov2 with interpolate_offset=0.1."""
    return lambda image: F.interpolate(
        image, scale_factor=tuple((side + 0.1) / image.shape[-1] for side in grid), mode='bicubic')


def antialias_rule(grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """dinov2 with interpolate_offset=0.0 and interpolate_antialias=True."""
    return lambda image: F.interpolate(image, size=grid, mode='bicubic', antialias=True)


def big_vision_rule(grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """big_vision/models/vit.py, resample_posemb."""
    import scipy.ndimage

    def rule(image):
        array = image[0].permute(1, 2, 0).numpy()
        zoom = (grid[0] / array.shape[0], grid[1] / array.shape[1], 1)
        return torch.from_numpy(scipy.ndimage.zoom(array, zoom, order=1)).permute(2, 0, 1)[None]

    return rule


def moco_v3_positions(grid: tuple[int, int], channels: int, temperature: float = 10000.0) -> Tensor:
    """moco-v3/vits.py, build_2d_sincos_position_embedding, with its class slot of zeros; ``grid`` is square there."""
    width, height = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing='ij')
    omega = 1.0 / temperature**(torch.arange(channels // 4, dtype=torch.float32) / (channels // 4))
    out_w, out_h = (torch.einsum('m,d->md', x.flatten(), omega) for x in (width, height))
    positions = torch.cat([out_w.sin(), out_w.cos(), out_h.sin(), out_h.cos()], dim=1)[None]
    return torch.cat([torch.zeros(1, 1, channels), positions], dim=1)


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not name.startswith('head')}


def publish_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state in the names of facebookresearch/dinov2: positions have a class slot, and there is a mask token."""
    generator = torch.Generator().manual_seed(7)
    width = state['cls_token'].shape[-1]
    state = without_head(state)
    if 'reg_token' in state:
        state['register_tokens'] = state.pop('reg_token')
        slot = torch.randn(1, 1, width, generator=generator) * 0.05
        state['pos_embed'] = torch.cat([slot.to(state['pos_embed'].device), state['pos_embed']], dim=1)
    if state['blocks.0.mlp.fc1.weight'].shape[0] != 4 * width:
        state = {name.replace('mlp.fc1', 'mlp.w12').replace('mlp.fc2', 'mlp.w3'): x for name, x in state.items()}
    state['mask_token'] = torch.randn(1, width, generator=generator)
    return state


def publish_deit3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state in the names of DeiT-III's files."""
    return {name.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): x for name, x in state.items()}
