from collections.abc import Iterator

from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor
from mmpretrain.models.backbones import VisionTransformer
from torch import nn

from ...registry import OPTIM_WRAPPER_CONSTRUCTORS

_KEYS = {'layer_decay_rate', 'custom_keys'}
_EMBEDDINGS = {'cls_token', 'dist_token', 'pos_embed'}
_FIRST = _EMBEDDINGS | {'patch_embed', 'pre_norm'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rates for any model that holds ViTs, wherever they are: classifier, detector, segmentor.

    A tensor of layer l learns at ``lr * layer_decay_rate ** (L + 1 - l)``, L being the depth of its ViT (BEiT, arXiv
    2106.08254): l = 0 for patch, class and position embeddings, DeiT's distillation token and the norm before the first
    block, l = i + 1 for block i, L + 1 for the final norm and all that is not in a ViT. Weights of one dimension
    (biases, norms, layer scales), tokens, positions and relative positions do not decay.

    Args:
        optim_wrapper_cfg: its ``optimizer`` needs an ``lr``.
        paramwise_cfg: ``layer_decay_rate``, in (0, 1]; and ``custom_keys``, part of a name -> ``lr_mult``,
            ``decay_mult``, which multiply what is said above; of several keys in a name the longest counts.

    Example:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='mmhdistill.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.75))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if rate is None or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.layer_decay_rate is {rate}: give a rate in (0, 1], for example 0.65; 1 is '
                             'one learning rate for all.')
        if unknown := sorted(set(self.paramwise_cfg) - _KEYS):
            raise ValueError(f'paramwise_cfg has {unknown}, which layer decay does not know: it takes '
                             f'{sorted(_KEYS)}; biases, norms and embeddings never decay.')
        if self.base_lr is None:
            raise ValueError("layer decay scales the optimizer's learning rate: give optimizer an lr.")

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append one group per layer and weight decay to ``params``, and log the table of them."""
        rate, keys = self.paramwise_cfg['layer_decay_rate'], self.paramwise_cfg.get('custom_keys', {})
        keys = sorted(keys.items(), key=lambda item: (-len(item[0]), item[0]))
        groups: dict[tuple, dict] = {}
        vits = find_vits(module)
        if not vits:
            raise ValueError(f'{type(module).__name__} holds no VisionTransformer, so there are no layers whose '
                             'learning rate could decay: use a ViT of mmpretrain or mmhdistill, or another '
                             'constructor.')
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            owner, layer, last = _place(name, vits)
            mults = next((mults for key, mults in keys if key in name), {})
            decays = parameter.ndim > 1 and not _is_embedding(name)
            lr = self.base_lr * rate**(last - layer) * mults.get('lr_mult', 1.0)
            weight_decay = (self.base_wd or 0.0) * decays * mults.get('decay_mult', 1.0)
            label = 'rest' if owner == '~' else f'{owner}{layer}'
            group = groups.setdefault((owner, layer, lr, weight_decay), dict(
                params=[], param_names=[], layer=label, lr=lr, weight_decay=weight_decay))
            group['params'].append(parameter)
            group['param_names'].append(name)
        params.extend(group for _, group in sorted(groups.items(), key=lambda item: item[0]))
        MMLogger.get_current_instance().info('learning rate by layer:\n' + '\n'.join(_table(params)))


def find_vits(model: nn.Module) -> dict[str, VisionTransformer]:
    """Every ViT in ``model``, by the prefix of its parameters' names."""
    return {f'{name}.' if name else '': module for name, module in model.named_modules()
            if isinstance(module, VisionTransformer)}


def _place(name: str, vits: dict[str, VisionTransformer]) -> tuple[str, int, int]:
    """Of a parameter: prefix of its ViT, layer in it, and the layer that learns at the full rate."""
    for prefix, vit in vits.items():
        if name.startswith(prefix):
            last = vit.num_layers + 1
            first, *rest = name.removeprefix(prefix).split('.')
            if first == 'layers':
                return prefix, int(rest[0]) + 1, last
            return prefix, 0 if first in _FIRST else last, last
    return '~', 0, 0


def _is_embedding(name: str) -> bool:
    leaf = name.rpartition('.')[2]
    return leaf in _EMBEDDINGS or leaf.startswith('rel_pos')


def _table(groups: list[dict]) -> Iterator[str]:
    yield f'{"layer":<24} {"lr":>10} {"weight decay":>12} {"tensors":>8}'
    for group in groups:
        yield f'{group["layer"]:<24} {group["lr"]:>10.3g} {group["weight_decay"]:>12.3g} {len(group["params"]):>8}'
