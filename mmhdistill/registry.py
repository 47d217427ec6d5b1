"""Child registries of mmengine's roots, scope ``mmhdistill``.

Refer to our components as ``mmhdistill.Name``: the prefix works from every OpenMMLab project, whatever its scope.
"""
from pathlib import Path

from mmengine import registry as root
from mmengine.model import PretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.registry import Registry, build_runner_from_cfg
from mmengine.runner import CheckpointLoader
from torch import nn

_SCOPE = 'mmhdistill'
_SCHEME = 'mmhdistill:'

MODELS = Registry('model', parent=root.MODELS, scope=_SCOPE, locations=['mmhdistill.models'])
HOOKS = Registry('hook', parent=root.HOOKS, scope=_SCOPE, locations=['mmhdistill.engine'])
OPTIM_WRAPPERS = Registry('optim_wrapper', parent=root.OPTIM_WRAPPERS, scope=_SCOPE, locations=['mmhdistill.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim_wrapper_constructor', parent=root.OPTIM_WRAPPER_CONSTRUCTORS, scope=_SCOPE, locations=['mmhdistill.engine'])
DATASETS = Registry('dataset', parent=root.DATASETS, scope=_SCOPE, locations=['mmhdistill.datasets'])
TRANSFORMS = Registry('transform', parent=root.TRANSFORMS, scope=_SCOPE, locations=['mmhdistill.datasets'])
DATA_SAMPLERS = Registry('data sampler', parent=root.DATA_SAMPLERS, scope=_SCOPE, locations=['mmhdistill.engine'])
LOOPS = Registry('loop', parent=root.LOOPS, scope=_SCOPE, locations=['mmhdistill.engine'])
RUNNERS = Registry(
    'runner', build_func=build_runner_from_cfg, parent=root.RUNNERS, scope=_SCOPE, locations=['mmhdistill.engine'])
METRICS = Registry('metric', parent=root.METRICS, scope=_SCOPE, locations=['mmhdistill.evaluation'])


@CheckpointLoader.register_scheme(prefixes=_SCHEME)
def _refuse(filename: str, map_location=None) -> dict:
    """A loader does not know the model, so it cannot tell whether the student fits."""
    raise ValueError(f"'{filename}' is what a ViT of mmpretrain or mmhdistill starts from, as backbone=dict(type="
                     f"'mmpretrain.VisionTransformer', init_cfg=dict(type='Pretrained', checkpoint='{filename}')). "
                     "Other ViTs, such as mmseg's, have other parameters; load_from takes the file itself, without "
                     f"'{_SCHEME}'.")


_load = PretrainedInit.__call__


def _start(self: PretrainedInit, module: nn.Module) -> None:
    """``init_cfg=dict(type='Pretrained', checkpoint='mmhdistill:FILE')``: the student of a file, loaded strictly.

    mmengine only warns of tensors that do not fit, and goes on with random ones. All other checkpoints are its own
    matter, but for a ViT that would get none of a file's tensors.
    """
    checkpoint = str(self.checkpoint)
    if not checkpoint.startswith(_SCHEME):
        if self.prefix is None and hasattr(module, 'arch_settings') and Path(checkpoint).is_file():
            _check_any(module, checkpoint)
        _load(self, module)
        return
    if self.prefix is not None:
        raise ValueError(f"checkpoint='{checkpoint}' is the student alone, whose names have no prefix: leave "
                         f"prefix='{self.prefix}' out.")
    from .models.students.checkpoint import start_from_student
    start_from_student(module, checkpoint.removeprefix(_SCHEME))
    if hasattr(module, '_params_init_info'):
        update_init_info(module, init_info=self._get_init_info())


PretrainedInit.__call__ = _start


def _check_any(module: nn.Module, file: str) -> None:
    content = CheckpointLoader.load_checkpoint(file, map_location='cpu')
    names = content.get('state_dict', content) if isinstance(content, dict) else {}
    if not {name.removeprefix('module.') for name in names} & module.state_dict().keys():
        raise ValueError(f'no tensor of {file} is one of {type(module).__name__}: for the student of a distiller, '
                         f"write checkpoint='{_SCHEME}{file}'.")
