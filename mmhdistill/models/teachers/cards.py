"""The teacher cards that ship. Adding a teacher is adding a card (and a format, if its file's is new)."""
import difflib

from .card import TeacherCard, make_card

_IMAGENET = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
_OPENAI = dict(mean=(122.7709383, 116.7460125, 104.09373615), std=(68.5005327, 66.6321579, 70.32316305))
_HALF = dict(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))

_TINY = dict(embed_dims=192, depth=12, num_heads=3)
_SMALL = dict(embed_dims=384, depth=12, num_heads=6)
_BASE = dict(embed_dims=768, depth=12, num_heads=12)
_LARGE = dict(embed_dims=1024, depth=24, num_heads=16)
_HUGE = dict(embed_dims=1280, depth=32, num_heads=16)
_SO400M = dict(embed_dims=1152, depth=27, num_heads=16, mlp_ratio=4304 / 1152)
_GIANT = dict(embed_dims=1536, depth=40, num_heads=24, swiglu=True)

_FB = 'https://dl.fbaipublicfiles.com'
_HUB = 'https://huggingface.co'


def _clip(name: str, file: str, sha256: str, **size) -> TeacherCard:
    return TeacherCard(name=name, url=f'https://openaipublic.azureedge.net/clip/models/{sha256}/{file}.pt',
                       sha256=sha256, pre_norm=True, activation='quick_gelu', norm_eps=1e-5,
                       resampling='bicubic-antialias', format='openai-clip', licence='MIT', **_OPENAI, **size)


def _open_clip(name: str, url: str, sha256: str | None, **facts) -> TeacherCard:
    return TeacherCard(**{
        **dict(name=name, url=url, sha256=sha256, pre_norm=True, norm_eps=1e-5, resampling='bicubic-antialias',
               format='openai-clip', licence='MIT'), **_OPENAI, **facts})


def _mae(name: str, file: str, md5: str, sha256: str | None = None, **size) -> TeacherCard:
    return TeacherCard(name=name, url=f'{_FB}/mae/pretrain/mae_pretrain_vit_{file}.pth', md5=md5, sha256=sha256,
                       format='timm', licence='CC-BY-NC-4.0', **_IMAGENET, **size)


def _dino(name: str, file: str, sha256: str | None = None, **size) -> TeacherCard:
    return TeacherCard(name=name, url=f'{_FB}/dino/{file}_pretrain/{file}_pretrain.pth', sha256=sha256, format='timm',
                       resampling='bicubic-offset', licence='Apache-2.0', **_IMAGENET, **size)


def _dinov2(name: str, size: str, registers: int, sha256: str, **facts) -> TeacherCard:
    return TeacherCard(
        name=name, url=f'{_FB}/dinov2/dinov2_vit{size}14/dinov2_vit{size}14{"_reg4" if registers else ""}_pretrain.pth',
        sha256=sha256, patch_size=14, img_size=518, registers=registers, layer_scale=True, format='timm',
        resampling='bicubic-antialias' if registers else 'bicubic-offset', licence='Apache-2.0', **_IMAGENET, **facts)


def _deit(name: str, file: str, sha256: str, registers: int = 0, **size) -> TeacherCard:
    return TeacherCard(name=name, url=f'{_FB}/deit/{file}-{sha256}.pth', sha256=sha256, patch_size=16, format='timm',
                       registers=registers, licence='Apache-2.0', **_IMAGENET, **size)


def _deit3(name: str, file: str, **size) -> TeacherCard:
    return TeacherCard(name=name, url=f'{_FB}/deit/deit_3_{file}.pth', patch_size=16, layer_scale=True, format='timm',
                       licence='Apache-2.0', **_IMAGENET, **size)


def _moco_v3(name: str, file: str, **size) -> TeacherCard:
    return TeacherCard(name=name, url=f'{_FB}/moco-v3/{file}/{file}.pth.tar', patch_size=16, resampling='sincos',
                       format='timm', licence='CC-BY-NC-4.0', **_IMAGENET, **size)


def _siglip(name: str, file: str, sha256: str, **size) -> TeacherCard:
    return TeacherCard(name=name, url=f'{_HUB}/google/{file}/model.safetensors', sha256=sha256, class_token=False,
                       activation='gelu_tanh', resampling='bilinear-corners', format='huggingface-clip',
                       licence='Apache-2.0', **_HALF, **size)


def _augreg(name: str, file: str, **size) -> TeacherCard:
    # timm's conversion of the authors' .npz files, with timm's rule for positions [choice].
    return TeacherCard(name=name, url=f'{_HUB}/timm/{file}/resolve/main/model.safetensors', patch_size=16,
                       resampling='bicubic-antialias', format='timm', licence='Apache-2.0', **_HALF, **size)


# Where the authors publish no hash, the one given is that which several independent projects pin for the same URL.
_CARDS = (
    _clip('clip-vit-b-p32', 'ViT-B-32', '40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af',
          patch_size=32, **_BASE),
    _clip('clip-vit-b-p16', 'ViT-B-16', '5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f',
          patch_size=16, **_BASE),
    _clip('clip-vit-l-p14', 'ViT-L-14', 'b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836',
          patch_size=14, **_LARGE),
    _clip('clip-vit-l-p14-336', 'ViT-L-14-336px', '3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02',
          patch_size=14, img_size=336, **_LARGE),
    _open_clip('openclip-vit-b-p16-datacomp',
               f'{_HUB}/laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K/resolve/main/open_clip_pytorch_model.bin',
               '80905176486d952914c1deb3b753b8e653ab54aa4ffb14208bc5007cf7643a16', patch_size=16, **_BASE),
    _open_clip('openclip-vit-b-p16-laion400m',
               'https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/'
               'vit_b_16-laion400m_e32-55e67d44.pt', '55e67d44', patch_size=16, **_BASE),
    _open_clip('openclip-vit-l-p14-laion400m',
               'https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/'
               'vit_l_14-laion400m_e32-3d133497.pt', '3d133497', patch_size=14, **_LARGE),
    # Trained with mean and std 0.5, unlike the other CLIPs.
    _open_clip('openclip-vit-l-p14-laion2b',
               f'{_HUB}/laion/CLIP-ViT-L-14-laion2B-s32B-b82K/resolve/main/open_clip_pytorch_model.bin', None,
               patch_size=14, **_LARGE, **_HALF),
    _siglip('siglip-vit-b-p16', 'siglip-base-patch16-224/resolve/2c0865f67e8bb3f31deda831c7a5b27961181627',
            '9ec7094b57c7c76a0688bfe84e5163fd0112d041737cb587cbf12921240500f9', patch_size=16, **_BASE),
    _siglip('siglip-vit-l-p16-256', 'siglip-large-patch16-256/resolve/3bae8ca81b490faa0803ba07cf45159cec2f2ef4',
            'e00d04afb3fb45b0113e5c79b6d6889eff5f240e9c54cfb149dab4a3e304e9a3', patch_size=16, img_size=256, **_LARGE),
    _siglip('siglip-vit-so400m-p14-384', 'siglip-so400m-patch14-384/resolve/9fdffc58afc957d1a03a25b10dba0329ab15c2a3',
            'ea2abad2b7f8a9c1aa5e49a244d5d57ffa71c56f720c94bc5d240ef4d6e1d94a', patch_size=14, img_size=384,
            **_SO400M),
    _mae('mae-vit-b-p16', 'base', '8cad7c', 'aec5f0b68e5f3193a00b07bc65a37440db549c15b36b8bea242606cc40c4bc5d',
         patch_size=16, **_BASE),
    _mae('mae-vit-l-p16', 'large', 'b8b06e', patch_size=16, **_LARGE),
    _mae('mae-vit-h-p14', 'huge', '9bdbb0', patch_size=14, **_HUGE),
    _dino('dino-vit-s-p16', 'dino_deitsmall16', patch_size=16, **_SMALL),
    _dino('dino-vit-s-p8', 'dino_deitsmall8', patch_size=8, **_SMALL),
    _dino('dino-vit-b-p16', 'dino_vitbase16', 'bf34ad0f424b9029b593e8dc3ed553bf26e88bcba0d32bf3e62a6209cb64c85e',
          patch_size=16, **_BASE),
    _dino('dino-vit-b-p8', 'dino_vitbase8', patch_size=8, **_BASE),
    _dinov2('dinov2-vit-s-p14', 's', 0, 'b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9', **_SMALL),
    _dinov2('dinov2-vit-b-p14', 'b', 0, '0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73', **_BASE),
    _dinov2('dinov2-vit-l-p14', 'l', 0, 'd5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428', **_LARGE),
    _dinov2('dinov2-vit-g-p14', 'g', 0, 'baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3', **_GIANT),
    _dinov2('dinov2-reg4-vit-s-p14', 's', 4, 'f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb',
            **_SMALL),
    _dinov2('dinov2-reg4-vit-b-p14', 'b', 4, '73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71',
            **_BASE),
    _dinov2('dinov2-reg4-vit-l-p14', 'l', 4, '36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51',
            **_LARGE),
    _dinov2('dinov2-reg4-vit-g-p14', 'g', 4, '746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283',
            **_GIANT),
    _deit('deit-vit-ti-p16', 'deit_tiny_patch16_224', 'a1311bcf', **_TINY),
    _deit('deit-vit-s-p16', 'deit_small_patch16_224', 'cd65a155', **_SMALL),
    _deit('deit-vit-b-p16', 'deit_base_patch16_224', 'b5f2ef4d', **_BASE),
    _deit('deit-distilled-vit-b-p16', 'deit_base_distilled_patch16_224', 'df68dfff', registers=1, **_BASE),
    _deit3('deit3-vit-s-p16', 'small_224_1k', **_SMALL),
    _deit3('deit3-vit-b-p16', 'base_224_1k', **_BASE),
    _deit3('deit3-vit-b-p16-in21k', 'base_224_21k', **_BASE),
    _deit3('deit3-vit-l-p16', 'large_224_1k', **_LARGE),
    _deit3('deit3-vit-l-p16-in21k', 'large_224_21k', **_LARGE),
    TeacherCard(
        name='ibot-vit-b-p16',
        url='https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/vitb_16/checkpoint_teacher.pth',
        patch_size=16, format='timm', resampling='bicubic-offset', licence='Apache-2.0', **_BASE, **_IMAGENET),
    _moco_v3('mocov3-vit-s-p16', 'vit-s-300ep', **{**_SMALL, 'num_heads': 12}),
    _moco_v3('mocov3-vit-b-p16', 'vit-b-300ep', **_BASE),
    _augreg('augreg-vit-s-p16-in21k', 'vit_small_patch16_224.augreg_in21k', **_SMALL),
    _augreg('augreg-vit-b-p16-in21k', 'vit_base_patch16_224.augreg_in21k', **_BASE),
    _augreg('augreg2-vit-b-p16', 'vit_base_patch16_224.augreg2_in21k_ft_in1k', **_BASE),
    _augreg('augreg-vit-l-p16-in21k', 'vit_large_patch16_224.augreg_in21k', **_LARGE),
)
CARDS = {card.name: card for card in _CARDS}


def find_card(card: str | dict | TeacherCard) -> TeacherCard:
    """A shipped card by name, or one's own as a dict of :class:`TeacherCard`'s fields."""
    if not isinstance(card, str | dict | TeacherCard):
        raise ValueError(f'a teacher card is a name or a dict, got {card!r}.')
    if isinstance(card, TeacherCard):
        return card
    if isinstance(card, dict):
        return make_card(card)
    if card not in CARDS:
        close = difflib.get_close_matches(card, CARDS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ''
        raise ValueError(f"unknown teacher card '{card}'.{hint} The cards are {', '.join(CARDS)}; a teacher of "
                         'your own is a dict of the fields of mmhdistill.models.TeacherCard, and any ViT of timm or '
                         'transformers is a TimmTeacher or HuggingFaceTeacher by its name.')
    return CARDS[card]
