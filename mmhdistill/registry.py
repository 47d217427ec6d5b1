"""Child registries of mmengine's roots, scope ``mmhdistill``.

Refer to our components as ``mmhdistill.Name``: the prefix works from every OpenMMLab project, whatever its scope.
"""
from mmengine import registry as root
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader

_SCOPE = 'mmhdistill'

MODELS = Registry('model', parent=root.MODELS, scope=_SCOPE, locations=['mmhdistill.models'])
HOOKS = Registry('hook', parent=root.HOOKS, scope=_SCOPE, locations=['mmhdistill.engine'])
OPTIM_WRAPPERS = Registry('optim_wrapper', parent=root.OPTIM_WRAPPERS, scope=_SCOPE, locations=['mmhdistill.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim_wrapper_constructor', parent=root.OPTIM_WRAPPER_CONSTRUCTORS, scope=_SCOPE, locations=['mmhdistill.engine'])
DATASETS = Registry('dataset', parent=root.DATASETS, scope=_SCOPE, locations=['mmhdistill.datasets'])
METRICS = Registry('metric', parent=root.METRICS, scope=_SCOPE, locations=['mmhdistill.evaluation'])


@CheckpointLoader.register_scheme(prefixes='mmhdistill:')
def load_from_mmhdistill(filename: str, map_location=None) -> dict:
    """The student of ``checkpoint='mmhdistill:FILE'``, from which the ViT of any OpenMMLab model can start."""
    from .models.students.checkpoint import read_student
    return dict(state_dict=read_student(filename.removeprefix('mmhdistill:')))
