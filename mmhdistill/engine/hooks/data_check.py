import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.fileio import get_text
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ...registry import HOOKS
from ..optim.layer_decay import find_vits

# Of a classifier, a detector, a segmentor: where num_classes is set. Other heads may have classes of their own.
_HEADS = re.compile(r'(head|head\.loss_module|data_preprocessor|(roi_head\.)?(bbox|mask)_head(\.\d+)?|'
                    r'decode_head(\.\d+)?)$')


@HOOKS.register_module()
class DataCheck(Hook):
    """Refuses data that do not fit the model, before the first step: classes by name and number, and image sizes.

    Heads learn labels, which are places in a list of names. A data set must give these names; validation must have
    training's, in its order; a checkpoint must be tested on the names that it was trained on; a file of COCO's format
    must have them in its order, by which mmdet numbers labels; and heads must have as many outputs. No image may be
    smaller than a patch: the ViT of mmpretrain would fill it up in silence. Warns where a student that a ViT starts
    from was fed images of another normalisation, and where its layers are frozen in part.

    For classifiers, detectors and segmentors; models without their heads are only checked for image sizes.

    Raises:
        ValueError: the data do not fit.
    """

    def __init__(self):
        self._trained_on: list[str] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._trained_on = _names((checkpoint.get('meta') or {}).get('dataset_meta'))

    def before_train(self, runner: Runner) -> None:
        model = _model(runner)
        for name, vit in find_vits(model).items():
            _compare_start(model, f'model.{name}'.rstrip('.'), vit)
        if not _heads(model):
            return
        dataset = runner.train_dataloader.dataset
        classes = _check_classes(dataset, 'train')
        _check_heads(model, dataset, classes)
        if runner.val_loop is not None:
            _check_same(_check_classes(runner.val_loop.dataloader.dataset, 'val'), 'val', classes, 'train')

    def before_test(self, runner: Runner) -> None:
        model, dataset = _model(runner), runner.test_dataloader.dataset
        if not _heads(model):  # then labels serve k-NN alone
            return
        classes = _check_classes(dataset, 'test')
        _check_heads(model, dataset, classes)
        if self._trained_on is not None:
            _check_same(classes, 'test', self._trained_on, 'the checkpoint')

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train') -> None:
        vits = find_vits(_model(runner))
        for image in _images((data_batch or {}).get('inputs')):
            for prefix, vit in vits.items():
                height, width = vit.patch_embed.projection.kernel_size
                if image.shape[-2] < height or image.shape[-1] < width:
                    raise ValueError(f'an image of {mode}_dataloader has {image.shape[-2]}x{image.shape[-1]} pixels, '
                                     f'less than one patch of {prefix.rstrip(".")} ({height}x{width}): enlarge it in '
                                     "the data set's pipeline, or use a ViT of smaller patches.")


def _model(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _images(inputs) -> Iterator[Tensor]:
    """Of a batch in whatever lists and dicts: views, branches, augmentations."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, dict | list | tuple):
        for part in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _images(part)


def _names(metainfo) -> list[str] | None:
    """Class names of a data set; the first's where mmdet concatenates several, whose metainfo may be a list."""
    if isinstance(metainfo, list | tuple):
        metainfo = metainfo[0] if metainfo else None
    classes = metainfo.get('classes') if isinstance(metainfo, dict) else None
    return list(classes) if classes else None


def dataset_parts(dataset) -> Iterator:
    """``dataset`` and all that it wraps."""
    yield dataset
    for inner in (getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())):
        if inner is not None:
            yield from dataset_parts(inner)


def _check_classes(dataset, split: str) -> list[str]:
    kind = f'{split}_dataloader.dataset ({type(dataset).__name__})'
    classes = _names(getattr(dataset, 'metainfo', None))
    if classes is None:
        raise ValueError(f'{kind} names no classes: give it metainfo=dict(classes=[...]), in the order of its labels.')
    for part in dataset_parts(dataset):
        own = _names(getattr(part, 'metainfo', None))
        if own is not None:
            _check_same(own, split, classes, f'its first part, {type(dataset).__name__}')
        if getattr(part, 'cat_ids', None) is not None:
            _check_categories(part, kind, classes)
    return classes


def _check_categories(part, kind: str, classes: list[str]) -> None:
    file = str(getattr(part, 'ann_file', kind))
    names = _categories(file)
    found = [name for name in names if name in classes]
    if len(part.cat_ids) == len(classes) and (not names or found == classes):
        return
    lacking = [name for name in classes if names and name not in names]
    what = f'lacks {_some(lacking)}' if lacking else f'numbers them {_some(found)}' if names else 'lacks some'
    raise ValueError(f'{file} has {len(part.cat_ids)} of the {len(classes)} classes of {kind}, {_some(classes)}, and '
                     f'{what}. Labels follow the order of the file: name its categories in that order in '
                     'metainfo=dict(classes=[...]).')


def _categories(file: str) -> list[str]:
    """Names in a file of COCO's format, in its order, without reading the millions of annotations as JSON."""
    if not Path(file).is_file():
        return []
    text = get_text(file)
    start = re.search(r'"categories"\s*:\s*(?=\[)', text)
    return [category['name'] for category in json.JSONDecoder().raw_decode(text, start.end())[0]] if start else []


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


def _heads(model: nn.Module) -> dict[str, int]:
    """Name of a setting -> number of classes."""
    found = {}
    for name, module in model.named_modules():
        number = getattr(module, 'num_classes', None)
        # A region proposal network alone has the class of objects.
        if isinstance(number, int) and _HEADS.match(name) and type(module).__name__ != 'RPNHead':
            found[f'model.{name.replace("loss_module", "loss")}.num_classes'] = number
    return {} if list(found) == ['model.data_preprocessor.num_classes'] else found


def _check_heads(model: nn.Module, dataset, classes: list[str]) -> None:
    metainfo = getattr(dataset, 'metainfo', None)
    things = metainfo.get('thing_classes') if isinstance(metainfo, dict) else None  # of a panoptic data set
    fitting = {len(classes), len(things or classes)}
    wrong = [f'{name}={number}' for name, number in _heads(model).items() if number not in fitting]
    if wrong:
        raise ValueError(f'the data have {len(classes)} classes ({_some(classes)}), and the model has '
                         f'{", ".join(wrong)}: set each to {len(classes)} (data_preprocessor may stand outside model), '
                         'or data_root to the folder of the classes that are meant.')


def _compare_start(model: nn.Module, name: str, vit: nn.Module) -> None:
    warn = MMLogger.get_current_instance().warning
    frozen = getattr(vit, 'frozen_stages', -1)
    if 0 < frozen < vit.num_layers:
        warn(f'{name}: {frozen} of {vit.num_layers} layers are frozen (frozen_stages), the others learn; a linear '
             f'probe freezes all {vit.num_layers}.')
    start = getattr(vit, 'started_from', {})
    for key in ('mean', 'std'):
        theirs, ours = start.get('data_preprocessor', {}).get(key), getattr(model.data_preprocessor, key, None)
        if theirs is None or ours is None:
            continue
        ours = ours.flatten().tolist()
        if any(abs(a - b) > 0.01 for a, b in zip(theirs, ours)):
            warn(f'{name} starts from {start["file"]}, whose images had {key} {_numbers(theirs)}; here they have '
                 f'{_numbers(ours)}: data_preprocessor.{key} should be the same.')


def _numbers(values: Sequence[float]) -> str:
    return '[' + ', '.join(f'{value:g}' for value in values) + ']'


def _some(names: list[str]) -> str:
    return ', '.join(names[:3] + ['...'] * (len(names) > 3)) or 'none'
