"""Child registries of mmengine's roots, scope ``mmhdistill``.

Refer to our components as ``mmhdistill.Name``: the prefix works from every OpenMMLab project, whatever its scope.
"""
from mmengine import registry as root
from mmengine.model import PretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

_SCOPE = 'mmhdistill'
_SCHEME = 'mmhdistill:'

MODELS = Registry('model', parent=root.MODELS, scope=_SCOPE, locations=['mmhdistill.models'])
HOOKS = Registry('hook', parent=root.HOOKS, scope=_SCOPE, locations=['mmhdistill.engine'])
OPTIM_WRAPPERS = Registry('optim_wrapper', parent=root.OPTIM_WRAPPERS, scope=_SCOPE, locations=['mmhdistill.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim_wrapper_constructor', parent=root.OPTIM_WRAPPER_CONSTRUCTORS, scope=_SCOPE, locations=['mmhdistill.engine'])
DATASETS = Registry('dataset', parent=root.DATASETS, scope=_SCOPE, locations=['mmhdistill.datasets'])
METRICS = Registry('metric', parent=root.METRICS, scope=_SCOPE, locations=['mmhdistill.evaluation'])


@CheckpointLoader.register_scheme(prefixes=_SCHEME)
def load_from_mmhdistill(filename: str, map_location=None) -> dict:
    """The student of ``checkpoint='mmhdistill:FILE'``, from which the ViT of any OpenMMLab model can start."""
    from .models.students.checkpoint import read_student
    return dict(state_dict=read_student(filename.removeprefix(_SCHEME)))


@root.WEIGHT_INITIALIZERS.register_module('Pretrained', force=True)
class StudentInit(PretrainedInit):
    """``init_cfg=dict(type='Pretrained', ...)``, which refuses a student of another architecture.

    mmengine warns of tensors that do not fit, and goes on with random ones. All but ``mmhdistill:`` is as in mmengine.

    Raises:
        ValueError: see :func:`mmhdistill.models.students.checkpoint.check_fit`.
    """

    def __call__(self, module: nn.Module) -> None:
        if not str(self.checkpoint).startswith(_SCHEME):
            super().__call__(module)
            return
        if self.prefix is not None:
            raise ValueError(f"checkpoint='{self.checkpoint}' is the student alone, whose names have no prefix: leave "
                             f"prefix='{self.prefix}' out.")
        from .models.students.checkpoint import check_fit
        weights = load_from_mmhdistill(self.checkpoint)['state_dict']
        _, dropped = check_fit(module, weights)
        if 'cls_token' in dropped:  # mmpretrain does so for the same grid alone
            weights['pos_embed'] = weights['pos_embed'][:, 1:]
        load_state_dict(module, weights, logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'{type(self).__name__}: load from {self.checkpoint}')
