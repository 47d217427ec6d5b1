"""Each shipped card at its full size, without memory, against the native model of that name."""
import pytest
import torch
from torch import nn

from mmhdistill.models.teachers import CARDS
from mmhdistill.models.teachers.formats import assemble, plan, recognise

from .native import publish_deit3, publish_dinov2, without_head

OPEN_CLIP = {
    'clip-vit-b-p32': ('ViT-B-32', 'openai'),
    'clip-vit-b-p16': ('ViT-B-16', 'openai'),
    'clip-vit-l-p14': ('ViT-L-14', 'openai'),
    'clip-vit-l-p14-336': ('ViT-L-14-336', 'openai'),
    'openclip-vit-b-p16-datacomp': ('ViT-B-16', 'datacomp_xl_s13b_b90k'),
    'openclip-vit-b-p16-laion400m': ('ViT-B-16', 'laion400m_e32'),
    'openclip-vit-l-p14-laion400m': ('ViT-L-14', 'laion400m_e32'),
    'openclip-vit-l-p14-laion2b': ('ViT-L-14', 'laion2b_s32b_b82k'),
}
# Their sizes are taken from timm, their layout from transformers.
SIGLIP = {
    'siglip-vit-b-p16': 'vit_base_patch16_siglip_224.webli',
    'siglip-vit-l-p16-256': 'vit_large_patch16_siglip_256.webli',
    'siglip-vit-so400m-p14-384': 'vit_so400m_patch14_siglip_384.webli',
}
TIMM = {
    'mae-vit-b-p16': 'vit_base_patch16_224.mae',
    'mae-vit-l-p16': 'vit_large_patch16_224.mae',
    'mae-vit-h-p14': 'vit_huge_patch14_224.mae',
    'dino-vit-s-p16': 'vit_small_patch16_224.dino',
    'dino-vit-s-p8': 'vit_small_patch8_224.dino',
    'dino-vit-b-p16': 'vit_base_patch16_224.dino',
    'dino-vit-b-p8': 'vit_base_patch8_224.dino',
    'dinov2-vit-s-p14': 'vit_small_patch14_dinov2.lvd142m',
    'dinov2-vit-b-p14': 'vit_base_patch14_dinov2.lvd142m',
    'dinov2-vit-l-p14': 'vit_large_patch14_dinov2.lvd142m',
    'dinov2-vit-g-p14': 'vit_giant_patch14_dinov2.lvd142m',
    'dinov2-reg4-vit-s-p14': 'vit_small_patch14_reg4_dinov2.lvd142m',
    'dinov2-reg4-vit-b-p14': 'vit_base_patch14_reg4_dinov2.lvd142m',
    'dinov2-reg4-vit-l-p14': 'vit_large_patch14_reg4_dinov2.lvd142m',
    'dinov2-reg4-vit-g-p14': 'vit_giant_patch14_reg4_dinov2.lvd142m',
    'deit-vit-ti-p16': 'deit_tiny_patch16_224.fb_in1k',
    'deit-vit-s-p16': 'deit_small_patch16_224.fb_in1k',
    'deit-vit-b-p16': 'deit_base_patch16_224.fb_in1k',
    'deit-distilled-vit-b-p16': 'deit_base_distilled_patch16_224.fb_in1k',
    'deit3-vit-s-p16': 'deit3_small_patch16_224.fb_in1k',
    'deit3-vit-b-p16': 'deit3_base_patch16_224.fb_in1k',
    'deit3-vit-b-p16-in21k': 'deit3_base_patch16_224.fb_in22k_ft_in1k',
    'deit3-vit-l-p16': 'deit3_large_patch16_224.fb_in1k',
    'deit3-vit-l-p16-in21k': 'deit3_large_patch16_224.fb_in22k_ft_in1k',
    'augreg-vit-s-p16-in21k': 'vit_small_patch16_224.augreg_in21k',
    'augreg-vit-b-p16-in21k': 'vit_base_patch16_224.augreg_in21k',
    'augreg2-vit-b-p16': 'vit_base_patch16_224.augreg2_in21k_ft_in1k',
    'augreg-vit-l-p16-in21k': 'vit_large_patch16_224.augreg_in21k',
}
# timm has none of these names; moco-v3/vits.py gives its ViT-S 12 heads. Positions are a parameter there too.
UNNAMED = {'mocov3-vit-s-p16': ('vit_small_patch16_224', 12), 'mocov3-vit-b-p16': ('vit_base_patch16_224', 12),
           'ibot-vit-b-p16': ('vit_base_patch16_224', 12)}


def test_cards__each_has_a_native_model_here():
    assert sorted(CARDS) == sorted([*OPEN_CLIP, *SIGLIP, *TIMM, *UNNAMED])


def build_timm(name, **kwargs):
    import timm
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def build_siglip(name):
    """transformers' model of the sizes of timm's, with a small text tower."""
    from transformers import SiglipConfig, SiglipModel
    vit = build_timm(name)
    block, = {(b.mlp.fc1.out_features, b.attn.num_heads) for b in vit.blocks}
    vision = dict(hidden_size=vit.embed_dim, num_hidden_layers=len(vit.blocks), intermediate_size=block[0],
                  num_attention_heads=block[1], image_size=vit.patch_embed.img_size[0],
                  patch_size=vit.patch_embed.patch_size[0])
    with torch.device('meta'):
        return SiglipModel(SiglipConfig(vision_config=vision, text_config=dict(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)))


def build_open_clip(name, tag):
    import open_clip
    with torch.device('meta'):
        return open_clip.model.CLIP(**open_clip.get_model_config(name),
                                    quick_gelu=open_clip.get_pretrained_cfg(name, tag).get('quick_gelu', False))


def native(name):
    """The native model and its state as published."""
    if name in OPEN_CLIP:
        model = build_open_clip(*OPEN_CLIP[name])
        return model, model.state_dict()
    if name in SIGLIP:
        model = build_siglip(SIGLIP[name])
        return model, model.state_dict()
    if name in UNNAMED:
        arch, heads = UNNAMED[name]
        model = build_timm(arch, num_heads=heads)
        if name.startswith('ibot'):
            return model, without_head(model.state_dict())
        state = {f'module.{part}.{key}': x for part in ('base_encoder', 'momentum_encoder')
                 for key, x in without_head(model.state_dict()).items()}
        return model, state
    model = build_timm(TIMM[name])
    publish = publish_dinov2 if 'dinov2' in name else publish_deit3 if 'deit3' in name else dict
    return model, publish(model.state_dict())


@pytest.mark.parametrize('name', CARDS)
def test_plan__native_model_of_full_size_fits_the_card(name):
    card = CARDS[name]
    _, state = native(name)
    with torch.device('meta'):
        own = card.build().state_dict()
    fmt, prefix = recognise(state)
    assert fmt.name == card.format
    fit = plan(fmt, prefix, state, own, card.registers)
    assert (fit.missing, fit.unexpected) == ([], [])
    assert {key: tuple(assemble(key, [state[part] for part in parts], card.num_extra_tokens).shape)
            for key, parts in fit.sources.items()} == {key: tuple(x.shape) for key, x in own.items()}
    # Nothing is read twice, and nothing lies between what is read and what is left aside.
    assert sorted(fit.used + fit.aside) == sorted(state)


def activation(module):
    if isinstance(module, nn.GELU):
        return {'none': 'gelu', 'tanh': 'gelu_tanh'}[module.approximate]
    return {'QuickGELU': 'quick_gelu', 'PytorchGELUTanh': 'gelu_tanh', 'SiLU': 'silu'}[type(module).__name__]


def facts(model):
    """Heads, eps and activation of a native model, which no shape shows; the same in every block."""
    if hasattr(model, 'vision_model'):
        blocks, parts = model.vision_model.encoder.layers, ('self_attn', 'layer_norm1', 'layer_norm2')
        acts = {activation(block.mlp.activation_fn) for block in blocks}
        norm = model.vision_model.post_layernorm
    elif hasattr(model, 'visual'):
        blocks, parts = model.visual.transformer.resblocks, ('attn', 'ln_1', 'ln_2')
        acts, norm = {activation(block.mlp.gelu) for block in blocks}, model.visual.ln_post
    else:
        blocks, parts, norm = model.blocks, ('attn', 'norm1', 'norm2'), model.norm
        acts = {activation(block.mlp.act) for block in blocks}
    heads = {getattr(block, parts[0]).num_heads for block in blocks}
    eps = {getattr(block, part).eps for block in blocks for part in parts[1:]} | {norm.eps}
    return heads, eps, acts


@pytest.mark.parametrize('name', CARDS)
def test_card__facts_that_no_shape_shows(name):
    card = CARDS[name]
    heads, eps, acts = facts(native(name)[0])
    assert (heads, eps) == ({card.num_heads}, {card.norm_eps})
    # The gated MLP of DINOv2 g has SiLU and no choice.
    assert acts == {'silu' if card.swiglu else card.activation}


@pytest.mark.parametrize('name', CARDS)
def test_card__normalisation_source_and_licence(name):
    import open_clip
    import timm
    card = CARDS[name]
    if name in OPEN_CLIP:
        config = open_clip.get_pretrained_cfg(*OPEN_CLIP[name])
        mean, std = config['mean'], config['std']
        assert card.url == config['url'] or not config['url'] and f'/{config["hf_hub"]}resolve/' in card.url
    elif name in UNNAMED:
        mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    else:
        config = timm.models.get_pretrained_cfg({**TIMM, **SIGLIP}[name])
        mean, std = config.mean, config.std
        assert config.license == card.licence.lower()
        if name not in SIGLIP:
            hub = f'https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors'
            assert card.url == (hub if name.startswith('augreg') else config.url)
    assert card.mean == pytest.approx([255 * x for x in mean], abs=1e-6)
    assert card.std == pytest.approx([255 * x for x in std], abs=1e-6)
