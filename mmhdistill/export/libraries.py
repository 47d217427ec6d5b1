"""The student in the names and settings of other libraries; formats are those that teachers are read in."""
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..models.teachers.formats import FORMATS, Format
from .student import Student

_FORMATS = {fmt.name: fmt for fmt in FORMATS}
_TIMM, _VIT = _FORMATS['timm'], _FORMATS['huggingface-vit']
# Of timm's own ViTs one by each eps of the norms: an eps cannot be written in JSON, a name can.
_TIMM_MODELS = {1e-6: 'vit_base_patch16_224', 1e-5: 'vit_base_patch16_clip_224'}
# Our name -> timm's and transformers'.
_ACTIVATIONS = {'GELU': ('gelu', 'gelu'), 'GELU tanh': ('gelu_tanh', 'gelu_pytorch_tanh'),
                'QuickGELU': ('quick_gelu', 'quick_gelu')}
_PARTS = {'gamma': 'layer scale', 'pre_norm': 'norm before the first block', 'w12': 'gated MLP', 'w3': 'gated MLP'}


def timm_obstacles(student: Student) -> list[str]:
    """What timm's ``VisionTransformer`` cannot express by arguments in JSON."""
    found = _obstacles(student, _TIMM)
    if hasattr(student.vit.layers[0].ffn, 'w12'):
        found.append(_PARTS['w12'])
    if _eps(student) not in _TIMM_MODELS:
        found.append(f'norms with an eps of {_eps(student):g} ({" or ".join(f"{eps:g}" for eps in _TIMM_MODELS)} only)')
    return found


def huggingface_obstacles(student: Student) -> list[str]:
    """What ``transformers.ViTModel`` cannot express."""
    return _obstacles(student, _VIT) + ([] if student.vit.with_cls_token else ['ViT without class token'])


def write_mmpretrain(student: Student, path: Path) -> dict:
    """``state_dict`` of ``mmpretrain.VisionTransformer``; its arguments are the manifest's architecture."""
    torch.save(dict(state_dict=student.vit.state_dict()), path)
    return {}


def write_timm(student: Student, path: Path) -> dict:
    """safetensors, and what ``timm.create_model`` makes the model by; ``model(images)`` are all tokens."""
    path.write_bytes(_safetensors(student, _TIMM))
    arch = student.vit.arch_settings
    settings = dict(
        model_name=_TIMM_MODELS[_eps(student)], img_size=_sides(student.image_size), patch_size=_patch(student),
        embed_dim=arch['embed_dims'], depth=arch['num_layers'], num_heads=arch['num_heads'],
        mlp_ratio=arch['feedforward_channels'] / arch['embed_dims'], qkv_bias=_qkv_bias(student),
        class_token=student.vit.with_cls_token, pre_norm=isinstance(student.vit.pre_norm, nn.LayerNorm),
        act_layer=_ACTIVATIONS[_activation(student)][0], num_classes=0, global_pool='',
        pretrained_cfg_overlay=dict(input_size=[3, *student.image_size], mean=[x / 255 for x in student.mean],
                                    std=[x / 255 for x in student.std], interpolation='bicubic'))
    if any('gamma' in name for name in student.vit.state_dict()):
        settings['init_values'] = 1.0  # Any number but None makes the layer scale; the values are the file's.
    return dict(timm=settings)


def write_huggingface(student: Student, path: Path) -> dict:
    """A folder that ``transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)`` loads."""
    path.mkdir()
    (path / 'model.safetensors').write_bytes(_safetensors(student, _VIT))
    arch, (height, width) = student.vit.arch_settings, student.image_size
    config = dict(
        architectures=['ViTModel'], model_type='vit', torch_dtype='float32', hidden_size=arch['embed_dims'],
        num_hidden_layers=arch['num_layers'], num_attention_heads=arch['num_heads'],
        intermediate_size=arch['feedforward_channels'], hidden_act=_ACTIVATIONS[_activation(student)][1],
        layer_norm_eps=_eps(student), image_size=_sides(student.image_size), patch_size=_patch(student),
        num_channels=3, qkv_bias=_qkv_bias(student), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    preprocessor = dict(
        image_processor_type='ViTImageProcessor', do_resize=True, size=dict(height=height, width=width),
        resample=3,  # bicubic, by Pillow's number
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=[x / 255 for x in student.mean], image_std=[x / 255 for x in student.std])
    for name, content in (('config.json', config), ('preprocessor_config.json', preprocessor)):
        (path / name).write_text(json.dumps(content, indent=1) + '\n')
    return {}


def _safetensors(student: Student, fmt: Format) -> bytes:
    """Not by ``save_file``, whose files only their owner may read."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in student.vit.state_dict().items():
        names = fmt.sources(key)
        # Copies: safetensors refuses parts of one storage.
        tensors.update(zip(names, (part.clone() for part in tensor.chunk(len(names)))))
    return save(tensors, metadata={'format': 'pt'})


def _obstacles(student: Student, fmt: Format) -> list[str]:
    found = {next((name for part, name in _PARTS.items() if part in key), key)
             for key in student.vit.state_dict() if not fmt.has(key)}
    norms = [module for name, module in student.vit.named_modules() if name.split('.')[-1] in ('ln1', 'ln2')]
    if any(type(norm) is not nn.LayerNorm for norm in norms) or len({norm.eps for norm in norms}) > 1:
        found.add('norms other than LayerNorm, or of several eps')
    if not hasattr(student.vit.layers[0].ffn, 'w12') and _activation(student) not in _ACTIVATIONS:
        found.add(f'activation {_activation(student)}')
    if not isinstance(student.backbone.get('layer_cfgs', {}), dict):
        found.add('blocks that differ (a list of layer_cfgs)')
    return sorted(found | {f'{name} of its own' for name in ('patch_cfg', 'in_channels')
                           if student.backbone.get(name, {}) not in ({}, 3)})


def _activation(student: Student) -> str:
    module = student.vit.layers[0].ffn.layers[0][1]
    tanh = ' tanh' if getattr(module, 'approximate', 'none') == 'tanh' else ''
    return type(module).__name__ + tanh


def _eps(student: Student) -> float:
    return student.vit.ln1.eps


def _qkv_bias(student: Student) -> bool:
    return student.vit.layers[0].attn.qkv.bias is not None


def _patch(student: Student) -> int | list[int]:
    return _sides(student.vit.patch_embed.projection.kernel_size)


def _sides(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)
