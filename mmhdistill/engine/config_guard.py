"""Settings that nothing would read, found before anything is built.

What is refused is known to be wrong: settings of our components, of what mmengine reads itself, of what is not there.
What a component of others may yet take is let pass, with a warning where it looks like a misspelling.
"""
import contextlib
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields

from mmengine import registry as roots
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
    set_random_seed,
)
from torch.utils.data import DataLoader

from .runner import DEFAULT_HOOKS, ResumableRunner

_SCOPE = 'mmhdistill'
# What a Runner reads of a config: its arguments, and what it looks up besides.
READ = {*inspect.signature(Runner).parameters, 'activation_checkpointing', 'compile', 'custom_imports',
        'efficient_conv_bn_eval', 'find_unused_parameters', 'init_weights_for_test_or_val', 'model_wrapper_cfg',
        'runner_type', 'strategy', 'sync_bn'}
# Keys that mmengine and mmcv take out of a component's settings before they call the component.
_TAKEN = {'type', '_scope_', '_delete_', 'constructor', 'convert_to_iter_based', 'paramwise_cfg', 'priority',
          'requires_grad'}
# [choice]: a key this much like a known one is a misspelling of it. Two that are both right: bg_cls_weight, which
# mmdet's DETR takes out of its loss's settings, and class_weight, 0.8.
_ALIKE = 0.85


def merge_checked(cfg: Config, options: dict | None) -> list[str]:
    """Merge ``--cfg-options`` into ``cfg``, and check what comes of it.

    Args:
        options: path, such as ``model.masker.keep_rate``, -> value.

    Returns:
        What was warned of: options that have been merged, and that may yet be misspelt.

    Raises:
        ValueError: naming every path that leads nowhere, and every argument that a component of ours does not take,
            with the one that may have been meant.
    """
    doubts = []
    if options:
        problems, doubts = _check_options(cfg, options)
        _refuse(problems)
        doubts += [
            f'--cfg-options {first}: a variable of {cfg.filename}, which the Runner does not read. Where the '
            'config has used it, it stays as it was: set it there, for example train_dataloader.dataset.pipeline.'
            for first in sorted({path.split('.')[0] for path in options} - READ)]
        for doubt in doubts:
            MMLogger.get_current_instance().warning(doubt)
        cfg.merge_from_dict(options)
    _refuse(component_problems(cfg))
    return doubts


def component_problems(cfg: Config) -> list[str]:
    """What is wrong with the settings of components of ours, wherever in ``cfg`` they are: one sentence each."""
    problems = []
    for path, settings in _nested('', dict(cfg.items())):
        kind = settings.get('type')
        if not _is_ours(kind):
            continue
        found = _find(kind, _SCOPE)
        if not found:
            name, ours = kind.partition('.')[2], _registered()
            problems.append(f"{path}.type is '{kind}', and {_unknown(name, ours, 'is registered')}")
            continue
        known, is_open = _arguments(found)
        problems += [f'{path} is a {kind if isinstance(kind, str) else kind.__name__}, and {_unknown(key, known)}'
                     for key in settings if not is_open and key not in known]
        for key, value in settings.items():
            if isinstance(value, dict) and 'type' not in value:
                problems += _untyped_entries(f'{path}.{key}', value)
                known_fields = _fields(key)
                problems += [f'{path}.{key} sets {name}, and {_unknown(name, known_fields)}'
                             for name in value if known_fields and name not in known_fields]
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError('\n'.join(['the config has settings that nothing would read:', *problems]))


def _components(entries: dict) -> list[str]:
    return [name for name, value in entries.items() if isinstance(value, dict) and 'type' in value]


def _untyped_entries(path: str, entries: dict) -> list[str]:
    """An entry without a type among components is a misspelt name: it was to change the one that is there."""
    components = _components(entries)
    return [f'{path}.{name} has no type, and {_unknown(name, components, "is there")}'
            for name, value in entries.items()
            if components and isinstance(value, dict) and value and 'type' not in value]


def _check_options(cfg: Config, options: dict) -> tuple[list[str], list[str]]:
    """What is wrong with ``options``, and what may be."""
    scope = cfg.get('default_scope') or 'mmengine'
    read = dict(cfg.items())
    runners = _find(options.get('runner_type', cfg.get('runner_type')), scope)
    if any(inspect.isclass(runner) and issubclass(runner, ResumableRunner) for runner in runners):
        read['default_hooks'] = {**DEFAULT_HOOKS, **(cfg.get('default_hooks') or {})}
    problems, doubts = [], []
    for path in options:
        problem, is_sure = _path_problem(path, read, options, scope)
        if problem:
            (problems if is_sure else doubts).append(f'--cfg-options {path}: {problem}')
    return problems, doubts


def _path_problem(path: str, cfg: dict, options: dict, scope: str) -> tuple[str, bool]:
    """Why ``path`` leads nowhere in ``cfg``, or '', and whether that is sure."""
    first, *rest = path.split('.')
    if odd := re.search(r'''[^\w /:*+-]''', path.replace('.', '')):
        return f'{odd[0]!r} cannot be in the name of a setting', True
    if first not in READ and first not in cfg:
        return _unknown(first, READ | set(cfg), 'is read'), True
    node, at, owner = cfg.get(first, {}), first, None
    for key in rest:
        if key == '_delete_':
            break
        if options.get(f'{at}._delete_'):
            node = {}
        drop = f'{at}._delete_=True drops what is there'
        kind = None
        if isinstance(node, (list, tuple)):
            if not (key.isdigit() and int(key) < len(node)):
                return f"{at} is a list of {len(node)}, counted from 0: '{key}' is none of them; {drop}", True
            node = node[int(key)]
        elif not isinstance(node, dict):
            return f'{at} is {node!r} in the config, which has no settings: set {at} itself; {drop}', True
        else:
            kind, scope = options.get(f'{at}.type', node.get('type')), node.get('_scope_') or scope
            if key not in node:
                problem, is_sure = _new_key_problem(key, node, at, kind, owner, options, scope)
                if problem:
                    return f'{at}: {problem}', is_sure
            node = node.get(key, {})
        at, owner = f'{at}.{key}', kind
    return '', False


def _new_key_problem(key: str, node: dict, at: str, kind, owner, options: dict, scope: str) -> tuple[str, bool]:
    """Why ``key`` may not be added to ``node``, or '', and whether that is sure.

    Args:
        at: path of ``node``.
        kind: type of ``node``, or None.
        owner: type of the settings that ``node`` is in, or None.
    """
    found, path = _find(kind, scope), f'{at}.{key}'
    known, is_open = _arguments(found)
    section = (_fields(at.rpartition('.')[2]) if _is_ours(owner) else _section(at)) if kind is None else None
    if section:
        known, is_open = section, False
    if key in known or kind is None and f'{path}.type' in options:
        return '', False
    alike = bool(difflib.get_close_matches(key, known.union(map(str, node)), 1, _ALIKE))
    if not is_open:
        # Others take keys out of the settings of their parts before they build them, as mmdet's FCNMaskHead does.
        return _unknown(key, known), alike or all(map(_is_ours, found))
    if (kind is None and _components(node) and (at == 'default_hooks' or _is_ours(owner))
            and (alike or path not in options)):
        return _unknown(key, node, 'is there') + ' (a new one needs a type)', True
    return _unknown(key, known.union(node), 'is known') if alike else '', False


def _section(path: str) -> set[str] | None:
    """Keys of a part of the config that mmengine reads itself; None where any key may be added."""
    if path.endswith('_dataloader') and '.' not in path:
        return _names(DataLoader) | {
            'batch_sampler', 'dataset', 'disable_subprocess_warning', 'num_batch_per_epoch', 'sampler'}
    known = {
        'auto_scale_lr': {'base_batch_size', 'enable'},
        'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
        'log_processor': _names(LogProcessor),
        'optim_wrapper': _names(OptimWrapper),
        'randomness': _names(set_random_seed),
        'test_cfg': _names(TestLoop),
        'train_cfg': _names(EpochBasedTrainLoop) | _names(IterBasedTrainLoop) | {'by_epoch'},
        'val_cfg': _names(ValLoop),
    }.get(path)
    return known and known | _TAKEN


def _fields(name: str) -> set[str] | None:
    """Keys of an argument of ours that is a dict of fixed keys."""
    from ..models.teachers.card import TeacherCard
    from ..models.teachers.loading import WeightFile
    owner = {'card': TeacherCard, 'init_from': WeightFile}.get(name)
    return owner and {field.name for field in fields(owner)}


def _nested(path: str, value) -> Iterator[tuple[str, dict]]:
    """Every dict in ``value``, with its path."""
    if isinstance(value, dict):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from _nested(f'{path}.{key}' if path else str(key), item)


def _is_ours(kind) -> bool:
    module = kind if isinstance(kind, str) else getattr(kind, '__module__', None)
    return isinstance(module, str) and module.startswith(f'{_SCOPE}.')


def _find(kind, scope: str) -> list:
    """What ``kind``, a name of a registry or the thing itself, may stand for."""
    if not isinstance(kind, str):
        return [kind] if callable(kind) else []
    prefix, _, name = kind.rpartition('.')
    if '.' in prefix:  # path of a class
        with contextlib.suppress(ImportError, AttributeError):
            return [getattr(importlib.import_module(prefix), name)]
        return []
    found = []
    with contextlib.suppress(ImportError):
        if (prefix or scope) != 'mmengine':
            importlib.import_module(f'{prefix or scope}.registry')
        for root in (value for value in vars(roots).values() if isinstance(value, Registry)):
            for registry in (root.children.get(prefix or scope), root if prefix in ('', 'mmengine') else None):
                if registry is not None:
                    registry.import_from_location()
                    if name in registry.module_dict:
                        found.append(registry.module_dict[name])
                        break
        return found
    return []


def _registered() -> set[str]:
    from .. import registry
    ours = [value for value in vars(registry).values() if isinstance(value, Registry) and value.scope == _SCOPE]
    for each in ours:
        each.import_from_location()
    return {name for each in ours for name in each.module_dict}


def _arguments(found: list) -> tuple[set[str], bool]:
    """Keys that the settings of a component may have, and whether there may be others."""
    parts = [_call_arguments(target) for target in found]
    return _TAKEN.union(*(names for names, _ in parts)), not parts or any(is_open for _, is_open in parts)


def _call_arguments(target) -> tuple[set[str], bool]:
    """Names of what ``target`` takes, and whether it may take others. ``**kwargs`` of a class are held to be those of
    its base class, which is sure of ours alone."""
    calls = [target]
    if inspect.isclass(target):
        calls = [vars(base)['__init__'] for base in target.__mro__[:-1] if '__init__' in vars(base)]
    names, is_open = set(), False
    for call in calls:
        try:
            parameters = inspect.signature(call).parameters.values()
        except (TypeError, ValueError):  # written in C
            return names, True
        names |= {parameter.name for parameter in parameters
                  if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
        is_open = not (inspect.isclass(target) and _is_ours(target))
    return names - {'self'}, is_open


def _names(target) -> set[str]:
    return _call_arguments(target)[0]


def _unknown(key: str, known: Iterable[str], what: str = 'is taken') -> str:
    """Sentence on a key that is not in ``known``."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(key), known, n=1)
    meant = f"did you mean '{close[0]}'? " if close else ''
    there = ', '.join(name for name in known if name not in _TAKEN) or 'nothing'
    return f"no '{key}' {what}: {meant}There is {there}"
