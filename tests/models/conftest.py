"""Tiny models and taps, and the relation distance as the definition reads."""
import math

import torch

from mmhdistill.models import MaskableVisionTransformer
from mmhdistill.models.taps import ViTOutput


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_vit(seed=0, embed_dims=16, depth=4, num_heads=2, **kwargs):
    """A 4x4-patch ViT of 32x32 images in eval mode, every parameter random: defaults are zeros and ones in places."""
    arch = dict(embed_dims=embed_dims, num_layers=depth, num_heads=num_heads, feedforward_channels=2 * embed_dims)
    kwargs = dict(arch=arch, img_size=32, patch_size=8, out_type='raw') | kwargs
    vit = MaskableVisionTransformer(**kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            offset = parameter.mean().round() if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
        if vit.cls_token is not None:
            vit.cls_token.normal_(generator=generator)
        vit.pos_embed.normal_(generator=generator)
    # Unlike nn.Module's, eval() of an mmpretrain backbone returns None.
    vit.eval()
    return vit


def without_blocks(vit):
    """The same model with blocks that add nothing: every hidden state is the embedding of its patch."""
    with torch.no_grad():
        for block in vit.layers:
            for linear in (block.attn.proj, block.ffn.layers[1]):
                linear.weight.zero_()
                linear.bias.zero_()
    return vit


def random_output(spec, taps, patches=16, batch=2, seed=0, keep_ids=None, dtype=torch.float32):
    """Random taps of a model of ``spec``, of full images or of the patches ``keep_ids``."""
    seen = patches if keep_ids is None else keep_ids.shape[1]
    tensors = {}
    for layer in sorted(taps):
        for kind in sorted(taps[layer]):
            seed += 1
            shape = (batch, spec.num_extra_tokens + seen, spec.embed_dims)
            tensors[layer, kind] = random(*shape, seed=1000 + seed, dtype=dtype)
    side = math.isqrt(patches)
    return ViTOutput(tensors, spec.num_extra_tokens, (side, side), dict.fromkeys(taps, keep_ids))


def random_keep_ids(batch, patches, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(patches, generator=generator)[:count].sort().values for _ in range(batch)])


def bilinear_matrix(source, target):
    """(target patches, source patches): weights of bilinear resampling of a grid whose outer edges coincide."""
    axes = []
    for old, new in zip(source, target):
        axis = torch.zeros(new, old, dtype=torch.float64)
        for row in range(new):
            x = min(max((row + 0.5) * old / new - 0.5, 0), old - 1)
            low = min(int(x), old - 2) if old > 1 else 0
            axis[row, low] += 1 - (x - low)
            axis[row, min(low + 1, old - 1)] += x - low
        axes.append(axis)
    return torch.kron(*axes)


def naive_relation(a, b, teacher_a, teacher_b, heads, distance='kl', temperature=1.0, beta=1.0):
    """The distance of two relations, image by image and head by head."""
    total = 0.0
    for image in range(len(a)):
        for head in range(heads):
            def scores(x, y, image=image, head=head):
                width = x.shape[-1] // heads
                channels = slice(head * width, (head + 1) * width)
                return x[image, :, channels] @ y[image, :, channels].T / math.sqrt(width)

            student, teacher = scores(a, b), scores(teacher_a, teacher_b)
            if distance == 'kl':
                p, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
                total = total + (t * (t / p).log()).sum(-1).mean()
            else:
                d = (student - teacher).abs()
                total = total + torch.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean()
    return total / (len(a) * heads)
