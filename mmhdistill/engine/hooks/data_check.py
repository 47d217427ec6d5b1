from collections.abc import Iterator, Sequence

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ...registry import HOOKS
from ..optim.layer_decay import find_vits


@HOOKS.register_module()
class DataCheck(Hook):
    """Refuses data that do not fit the model, before the first step: classes by name and number, and image sizes.

    Heads learn labels, which are places in a list of names. A data set must give these names; validation must have
    training's, in its order; a checkpoint must be tested on the names that it was trained on; a file of COCO's format
    must have each of them; and heads must have as many outputs. No image may be smaller than a patch: the ViT of
    mmpretrain would fill it up in silence.

    For classifiers, detectors and segmentors.

    Raises:
        ValueError: the data do not fit.
    """

    def __init__(self):
        self._trained_on: list[str] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        meta = checkpoint.get('meta', {}).get('dataset_meta') or {}
        self._trained_on = _names(meta.get('classes'))

    def before_train(self, runner: Runner) -> None:
        classes = _check_classes(runner.train_dataloader.dataset, 'train')
        _check_heads(_model(runner), classes)
        if runner.val_loop is not None:
            _check_same(_check_classes(runner.val_loop.dataloader.dataset, 'val'), 'val', classes, 'train')

    def before_test(self, runner: Runner) -> None:
        classes = _check_classes(runner.test_dataloader.dataset, 'test')
        # Without a head, labels serve k-NN alone.
        if _check_heads(_model(runner), classes) and self._trained_on is not None:
            _check_same(classes, 'test', self._trained_on, 'the checkpoint')

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train') -> None:
        if batch_idx or not data_batch:
            return
        for prefix, vit in find_vits(_model(runner)).items():
            height, width = vit.patch_embed.projection.kernel_size
            for image in data_batch['inputs']:
                if image.shape[-2] < height or image.shape[-1] < width:
                    raise ValueError(f'an image of {mode}_dataloader has {image.shape[-2]}x{image.shape[-1]} pixels, '
                                     f'less than one patch of {prefix.rstrip(".")} ({height}x{width}): enlarge it in '
                                     "the data set's pipeline, or use a ViT of smaller patches.")


def _model(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _names(classes: Sequence[str] | None) -> list[str] | None:
    return None if classes is None else list(classes)


def _parts(dataset) -> Iterator:
    """``dataset`` and all that it wraps."""
    yield dataset
    for inner in (getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())):
        if inner is not None:
            yield from _parts(inner)


def _check_classes(dataset, split: str) -> list[str]:
    kind = f'{split}_dataloader.dataset ({type(dataset).__name__})'
    classes = _names(getattr(dataset, 'metainfo', {}).get('classes'))
    if not classes:
        raise ValueError(f'{kind} names no classes: give it metainfo=dict(classes=[...]), in the order of its labels.')
    for part in _parts(dataset):
        found = getattr(part, 'cat_ids', None)
        if found is not None and len(found) != len(classes):
            raise ValueError(f'{getattr(part, "ann_file", kind)} has {len(found)} of the {len(classes)} classes of '
                             f'{kind}, so that labels would shift: name in metainfo=dict(classes=[...]) the categories '
                             'of that file.')
    return classes


def _check_same(classes: list[str], split: str, others: list[str], where: str) -> None:
    if classes == others:
        return
    missing, unknown = [x for x in others if x not in classes], [x for x in classes if x not in others]
    if missing or unknown:
        what = f'it lacks {_some(missing)} and has {_some(unknown)} beside them'
    else:
        what = f'the same in another order, {_some(classes)} and not {_some(others)}'
    raise ValueError(f'the {len(classes)} classes of {split}_dataloader are not the {len(others)} of {where}: {what}. '
                     'Labels are places in this list: give both the same, folders the same sub-folders (one may be '
                     'empty).')


def _check_heads(model: nn.Module, classes: list[str]) -> bool:
    """Whether there are any."""
    found = False
    for name, module in model.named_modules():
        # A region proposal has the class of objects alone.
        number = getattr(module, 'num_classes', None)
        if not isinstance(number, int) or 'rpn_head' in name.split('.'):
            continue
        found = True
        if number != len(classes):
            raise ValueError(f'model.{name} ({type(module).__name__}) has num_classes={number}, and the data '
                             f'{len(classes)} classes ({_some(classes)}): set num_classes there to {len(classes)}, or '
                             'data_root to the folder of the classes that are meant.')
    return found


def _some(names: list[str]) -> str:
    return ', '.join(names[:3] + ['...'] * (len(names) > 3)) or 'none'
