"""Each published format, against a native model of its kind that holds the same weights."""
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import save_checkpoint
from mmpretrain.registry import MODELS as MMPRETRAIN
from torch import nn

from mmhdistill.models.teachers import ViTTeacher
from mmhdistill.models.teachers.formats import recognise
from tests.helpers import log_messages, random_images, randomise, tiny_card

DEPTH, WIDTH, HEADS, PATCH, GRID = 3, 32, 4, 8, (4, 4)
EVERY_LAYER = frozenset({'hidden', 'q', 'k', 'v'})
TAPS = {0: EVERY_LAYER, 1: EVERY_LAYER, 2: EVERY_LAYER | {'features'}}
CLIP_CARD = tiny_card(pre_norm=True, activation='quick_gelu', norm_eps=1e-5)


class TimmBlock(nn.Module):

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH)))
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(WIDTH, 4 * WIDTH), fc2=nn.Linear(4 * WIDTH, WIDTH)))

    def forward(self, x):
        qkv = self.attn['qkv'](self.norm1(x))
        batch, tokens, _ = x.shape
        q, k, v = qkv.reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)).softmax(dim=-1)
        x = x + self.attn['proj']((attention @ v).transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x)))), qkv.split(WIDTH, dim=-1)


class TimmViT(nn.Module):
    """What MAE's encoder is, in timm's names."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, WIDTH, PATCH, PATCH)))
        self.blocks = nn.ModuleList(TimmBlock() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed['proj'](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        taps = {}
        for index, block in enumerate(self.blocks):
            x, qkv = block(x)
            taps.update({(index, 'hidden'): x, **{(index, kind): part for kind, part in zip('qkv', qkv)}})
        taps[DEPTH - 1, 'features'] = self.norm(x)
        return taps


class QuickGELU(nn.Module):

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential()
        for name, module in (('c_fc', nn.Linear(WIDTH, 4 * WIDTH)), ('gelu', QuickGELU()),
                             ('c_proj', nn.Linear(4 * WIDTH, WIDTH))):
            self.mlp.add_module(name, module)
        self.ln_2 = nn.LayerNorm(WIDTH)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):

    def __init__(self):
        super().__init__()
        self.resblocks = nn.Sequential(*[ClipBlock() for _ in range(DEPTH)])

    def forward(self, x):
        return self.resblocks(x)


class ClipVisual(nn.Module):
    """OpenAI's visual tower; tokens come first, as its nn.MultiheadAttention has them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(17, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = ClipTransformer()
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, 16))

    def embed(self, images):
        x = self.conv1(images).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_embedding.expand(1, x.shape[1], -1), x])
        return self.ln_pre(x + self.positional_embedding[:, None])

    def forward(self, images):
        return self.ln_post(self.transformer(self.embed(images))[0]) @ self.proj

    def taps(self, images):
        x, taps = self.embed(images), {}
        for index, block in enumerate(self.transformer.resblocks):
            qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).split(WIDTH, dim=-1)
            x = block(x)
            taps.update({(index, 'hidden'): x, **{(index, kind): part for kind, part in zip('qkv', qkv)}})
        taps[DEPTH - 1, 'features'] = self.ln_post(x)
        return {key: x.transpose(0, 1) for key, x in taps.items()}


class Clip(nn.Module):
    """The visual tower beside a text tower that has blocks of the same names, as in OpenAI's files."""

    def __init__(self):
        super().__init__()
        self.visual = ClipVisual()
        self.transformer = ClipTransformer()
        self.token_embedding = nn.Embedding(11, WIDTH)
        self.ln_final = nn.LayerNorm(WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(7, WIDTH))
        self.text_projection = nn.Parameter(torch.zeros(WIDTH, 16))
        self.logit_scale = nn.Parameter(torch.zeros([]))
        self.register_buffer('input_resolution', torch.tensor(32))

    def forward(self, images, text):
        x = self.token_embedding(text).transpose(0, 1) + self.positional_embedding[:, None]
        text_features = self.ln_final(self.transformer(x))[-1] @ self.text_projection
        return self.visual(images) @ text_features.t() * self.logit_scale.exp() + self.input_resolution


def native_vit():
    """Taps of an unmodified mmpretrain.VisionTransformer, read with hooks."""
    card = ViTTeacher(tiny_card(), checkpoint=None).card
    vit = randomise(MMPRETRAIN.build({**card.backbone(), 'out_indices': list(range(DEPTH))}))
    vit.eval()

    def taps(images):
        found, handles = {}, []
        for index, layer in enumerate(vit.layers):
            handles.append(layer.register_forward_hook(
                lambda _, __, out, index=index: found.update({(index, 'hidden'): out})))
            handles.append(layer.attn.qkv.register_forward_hook(
                lambda _, __, out, index=index: found.update(
                    {(index, kind): part for kind, part in zip('qkv', out.split(WIDTH, dim=-1))})))
        found[DEPTH - 1, 'features'] = vit(images)[-1]
        for handle in handles:
            handle.remove()
        return found

    return vit, taps


def load(path, card=None):
    """The loaded teacher's taps, its receipt, and its module."""
    teacher = ViTTeacher(card or tiny_card(), checkpoint=str(path))
    with log_messages() as messages:
        teacher.load()
    receipt, = messages
    return teacher(random_images(), GRID, TAPS).taps, receipt, teacher


def assert_equal_taps(ours, native, tolerance=1e-5):
    assert set(ours) == set(native)
    for key, expected in native.items():
        assert expected.std() > 0.05
        torch.testing.assert_close(ours[key], expected, rtol=0, atol=tolerance, msg=str(key))


@pytest.fixture
def timm():
    torch.manual_seed(0)
    return randomise(TimmViT()).eval()


@pytest.fixture
def clip():
    """Its weights are rounded to half precision and held in single."""
    torch.manual_seed(0)
    return randomise(Clip()).half().float().eval()


@torch.no_grad()
def test_from_timm__official_mae_encoder(timm, tmp_path):
    path = tmp_path / 'mae_pretrain_vit_base.pth'
    torch.save({'model': timm.state_dict()}, path)
    taps, receipt, _ = load(path)
    assert_equal_taps(taps, timm(random_images()))
    # 12 tensors in each of 3 blocks; class token, positions, 2 of the patch embedding, 2 of the final norm.
    assert '(timm format), 42/42 tensors' in receipt
    assert receipt.endswith('left aside: nothing')


@torch.no_grad()
def test_from_timm__official_mae_with_decoder_and_mask_token(timm, tmp_path):
    decoder = {
        'mask_token': torch.ones(1, 1, 16), 'decoder_pos_embed': torch.ones(1, 17, 16),
        'decoder_embed.weight': torch.ones(16, WIDTH), 'decoder_embed.bias': torch.ones(16),
        'decoder_blocks.0.norm1.weight': torch.ones(16), 'decoder_blocks.0.norm1.bias': torch.ones(16),
        'decoder_norm.weight': torch.ones(16), 'decoder_pred.weight': torch.ones(192, 16)
    }
    path = tmp_path / 'mae_visualize_vit_base.pth'
    torch.save({'model': {**decoder, **timm.state_dict()}}, path)
    taps, receipt, _ = load(path)
    assert_equal_taps(taps, timm(random_images()))
    assert '42/42 tensors' in receipt
    assert 'mask_token (1), decoder_pos_embed (1), decoder_embed.* (2), decoder_blocks.* (2)' in receipt


@torch.no_grad()
def test_from_timm__deit_classifier_head_is_left_aside(timm, tmp_path):
    state = {**timm.state_dict(), 'head.weight': torch.ones(10, WIDTH), 'head.bias': torch.ones(10)}
    path = tmp_path / 'deit.pth'
    torch.save({'model': state}, path)
    taps, receipt, _ = load(path)
    assert_equal_taps(taps, timm(random_images()))
    assert receipt.endswith('left aside: head.* (2)')


@torch.no_grad()
def test_from_timm__bare_state_dict(timm, tmp_path):
    path = tmp_path / 'dino.pth'
    torch.save(timm.state_dict(), path)
    assert_equal_taps(load(path)[0], timm(random_images()))


@torch.no_grad()
def test_from_moco_v3__base_encoder_is_taken_out_of_the_training_file(timm, tmp_path):
    momentum = randomise(TimmViT(), seed=5)
    state = {f'module.momentum_encoder.{name}': x for name, x in momentum.state_dict().items()}
    state |= {f'module.base_encoder.{name}': x for name, x in timm.state_dict().items()}
    state |= {'module.base_encoder.head.0.weight': torch.ones(8, WIDTH), 'module.predictor.0.weight': torch.ones(8, 8)}
    optimizer = torch.optim.AdamW(timm.parameters())
    path = tmp_path / 'vit-b-300ep.pth.tar'
    torch.save({'epoch': 300, 'arch': 'vit_base', 'state_dict': state, 'optimizer': optimizer.state_dict()}, path)
    taps, receipt, _ = load(path)
    assert_equal_taps(taps, timm(random_images()))
    assert '(moco-v3 format), 42/42 tensors' in receipt
    # 42 of the momentum encoder, the head and the predictor.
    assert receipt.endswith('left aside: module.* (44)')


@torch.no_grad()
def test_from_openai_clip__state_dict_in_half_precision(clip, tmp_path):
    path = tmp_path / 'clip.pt'
    torch.save({name: x.half() if x.is_floating_point() else x for name, x in clip.state_dict().items()}, path)
    taps, receipt, teacher = load(path, CLIP_CARD)
    assert_equal_taps(taps, clip.visual.taps(random_images()))
    assert {p.dtype for p in teacher.vit.parameters()} == {torch.float32}
    # 12 tensors in each of 3 blocks; class token, positions, patch weights, 2 of each outer norm.
    assert '(openai-clip format), 43/43 tensors' in receipt
    assert 'visual.* (1)' in receipt
    assert 'transformer.* (36)' in receipt


@torch.no_grad()
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('how', ['trace', 'script'])
def test_from_openai_clip__torchscript_archive_in_half_precision(how, clip, tmp_path):
    inputs = random_images(), torch.arange(14).reshape(2, 7) % 11
    native = clip.visual.taps(random_images())
    archive = torch.jit.trace(clip, inputs) if how == 'trace' else torch.jit.script(clip)
    path = tmp_path / 'ViT-B-16.pt'
    archive.half().save(path)
    taps, receipt, _ = load(path, CLIP_CARD)
    assert_equal_taps(taps, native)
    assert '(openai-clip format), 43/43 tensors' in receipt
    assert 'input_resolution (1)' in receipt


@torch.no_grad()
def test_from_mmpretrain__bare_backbone(tmp_path):
    vit, native = native_vit()
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    taps, receipt, _ = load(tmp_path / 'vit.pth')
    assert_equal_taps(taps, native(random_images()))
    assert '(mmpretrain format), 42/42 tensors' in receipt


@torch.no_grad()
def test_from_mmpretrain__image_classifier_of_a_runner_checkpoint(tmp_path):
    vit, native = native_vit()
    model = MMPRETRAIN.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VisionTransformer', arch=vit.arch_settings, img_size=32, patch_size=8),
            head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=WIDTH)))
    model.backbone.load_state_dict(vit.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    path = tmp_path / 'epoch_1.pth'
    save_checkpoint(
        {'meta': {'epoch': 1, 'dataset_meta': {'classes': ['a']}}, 'state_dict': model.state_dict(),
         'optimizer': optimizer.state_dict(), 'message_hub': {'log_scalars': {}}}, str(path))
    taps, receipt, _ = load(path)
    assert_equal_taps(taps, native(random_images()))
    assert receipt.endswith('left aside: head.* (2)')


@torch.no_grad()
def test_from_mmpretrain__mae_with_neck(tmp_path):
    vit, native = native_vit()
    model = MMPRETRAIN.build(
        dict(
            type='MAE',
            backbone=dict(type='MAEViT', arch=vit.arch_settings, img_size=32, patch_size=8),
            neck=dict(type='MAEPretrainDecoder', num_patches=16, patch_size=8, embed_dim=WIDTH, decoder_embed_dim=16,
                      decoder_depth=1, decoder_num_heads=2),
            head=dict(type='MAEPretrainHead', patch_size=8, loss=dict(type='PixelReconstructionLoss', criterion='L2'))))
    model.backbone.load_state_dict(vit.state_dict())
    path = tmp_path / 'mae.pth'
    save_checkpoint({'meta': {}, 'state_dict': model.state_dict()}, str(path))
    taps, receipt, _ = load(path)
    assert_equal_taps(taps, native(random_images()))
    aside = sum(not name.startswith('backbone.') for name in model.state_dict())
    assert receipt.endswith(f'left aside: neck.* ({aside})')


def test_recognise__tells_the_formats_apart_and_refuses_others(timm, clip):
    timm, clip = timm.state_dict(), clip.state_dict()
    moco = {f'module.base_encoder.{name}': x for name, x in timm.items()}
    vit = native_vit()[0].state_dict()
    nested = {f'backbone.{name}': x for name, x in vit.items()}
    assert [recognise(state).name for state in (timm, clip, moco, vit, nested)] == [
        'timm', 'openai-clip', 'moco-v3', 'mmpretrain', 'mmpretrain']
    assert recognise({'layer1.0.conv1.weight': torch.ones(1)}) is None
