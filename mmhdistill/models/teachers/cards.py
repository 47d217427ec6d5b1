"""Teacher cards: everything that differs between public ViTs, as data. Adding a teacher is adding a card."""
import difflib
from dataclasses import dataclass, fields

IMAGENET = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
CLIP = dict(mean=(122.7709383, 116.7460125, 104.09373615), std=(68.5005327, 66.6321579, 70.32316305))


@dataclass(frozen=True)
class TeacherCard:
    """A plain ViT and where its weights come from.

    Attributes:
        mean, std: of the images that it was trained on, RGB in 0-255.
        img_size: side of the square image that its position embedding was made for.
        pre_norm: LayerNorm before the first block and no bias in the patch embedding (CLIP).
        activation: ``gelu`` or ``quick_gelu``.
        url: of the file that its authors published.
        sha256: of that file, or its published beginning.
    """

    name: str
    embed_dims: int
    depth: int
    num_heads: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int = 224
    mlp_ratio: float = 4.0
    class_token: bool = True
    pre_norm: bool = False
    activation: str = 'gelu'
    norm_eps: float = 1e-6
    url: str | None = None
    sha256: str | None = None
    licence: str = ''

    def backbone(self) -> dict:
        """Config of the ``mmpretrain.VisionTransformer`` that it is."""
        activation = dict(gelu='GELU', quick_gelu='mmpretrain.QuickGELU')[self.activation]
        return dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(
                embed_dims=self.embed_dims,
                num_layers=self.depth,
                num_heads=self.num_heads,
                feedforward_channels=int(self.embed_dims * self.mlp_ratio)),
            img_size=self.img_size,
            patch_size=self.patch_size,
            out_type='raw',
            with_cls_token=self.class_token,
            pre_norm=self.pre_norm,
            norm_cfg=dict(type='LN', eps=self.norm_eps),
            layer_cfgs=dict(act_cfg=dict(type=activation)))


_BASE = dict(embed_dims=768, depth=12, num_heads=12, patch_size=16)
_LARGE = dict(embed_dims=1024, depth=24, num_heads=16)
_CLIP = dict(pre_norm=True, activation='quick_gelu', norm_eps=1e-5, licence='MIT', **CLIP)

CARDS = {
    card.name: card
    for card in (
        TeacherCard(
            name='clip-vit-b-p16',
            url='https://openaipublic.azureedge.net/clip/models/'
            '5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt',
            sha256='5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f',
            **_BASE, **_CLIP),
        TeacherCard(
            name='clip-vit-l-p14',
            patch_size=14,
            url='https://openaipublic.azureedge.net/clip/models/'
            'b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt',
            sha256='b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836',
            **_LARGE, **_CLIP),
        TeacherCard(
            name='mae-vit-b-p16',
            url='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth',
            licence='CC-BY-NC-4.0',
            **_BASE, **IMAGENET),
        TeacherCard(
            name='mae-vit-l-p16',
            patch_size=16,
            url='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth',
            licence='CC-BY-NC-4.0',
            **_LARGE, **IMAGENET),
        TeacherCard(
            name='deit-vit-b-p16',
            url='https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth',
            sha256='b5f2ef4d',
            licence='Apache-2.0',
            **_BASE, **IMAGENET),
        TeacherCard(
            name='dino-vit-b-p16',
            url='https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth',
            licence='Apache-2.0',
            **_BASE, **IMAGENET),
        TeacherCard(
            name='mocov3-vit-b-p16',
            url='https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar',
            licence='CC-BY-NC-4.0',
            **_BASE, **IMAGENET),
    )
}


def find_card(card: str | dict | TeacherCard) -> TeacherCard:
    """A shipped card by name, or one's own as a dict of :class:`TeacherCard`'s fields."""
    if isinstance(card, TeacherCard):
        return card
    if isinstance(card, str):
        if card not in CARDS:
            close = difflib.get_close_matches(card, CARDS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ''
            raise ValueError(f"unknown teacher card '{card}'.{hint} The cards are {', '.join(CARDS)}; a teacher of "
                             'your own is a dict of the fields of mmhdistill.models.TeacherCard.')
        return CARDS[card]
    known = {field.name for field in fields(TeacherCard)}
    required = {'name', 'embed_dims', 'depth', 'num_heads', 'patch_size', 'mean', 'std'}
    if unknown := set(card) - known:
        raise ValueError(f'a teacher card has no fields {sorted(unknown)}: the fields are {sorted(known)}.')
    if missing := required - set(card):
        raise ValueError(f'the teacher card lacks {sorted(missing)}: give them, as RGB in 0-255 for mean and std.')
    return TeacherCard(**card)
