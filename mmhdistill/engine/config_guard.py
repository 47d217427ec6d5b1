"""Settings that nothing would read, found before anything is built."""
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

from .runner import DEFAULT_HOOKS

_SCOPE = 'mmhdistill'
# What the Runner reads of a config: its arguments, and what it looks up besides.
READ = {*inspect.signature(Runner).parameters, 'compile', 'custom_imports', 'efficient_conv_bn_eval',
        'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn'}
# Keys that mmengine takes out of a component's settings before it calls the component.
_ALWAYS = {'type', '_scope_', '_delete_'}
_TAKEN = {'hook': {'priority'}, 'optim_wrapper': {'constructor', 'paramwise_cfg'},
          'parameter scheduler': {'convert_to_iter_based'}}
# [choice]: a key this much like one that is there is a misspelling of it, where any key may be added.
_ALIKE = 0.8


def merge_checked(cfg: Config, options: dict | None) -> None:
    """Merge ``--cfg-options`` into ``cfg``, and check what comes of it.

    Args:
        options: path, such as ``model.masker.keep_rate``, -> value.

    Raises:
        ValueError: naming every path that leads nowhere, and every argument that a component of ours does not take,
            with the one that may have been meant.
    """
    if options:
        _refuse(_option_problems(cfg, options))
        for first in sorted({path.split('.')[0] for path in options} - READ):
            MMLogger.get_current_instance().warning(
                f'--cfg-options {first}: a variable of {cfg.filename}, which the Runner does not read. Where the '
                'config has used it, it stays as it was: set it there, for example train_dataloader.dataset.pipeline.')
        cfg.merge_from_dict(options)
    _refuse(component_problems(cfg))


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
        known = _arguments(found)
        problems += [f'{path} is a {kind if isinstance(kind, str) else kind.__name__}, and {_unknown(key, known)}'
                     for key in settings if known is not None and key not in known]
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


def _untyped_entries(path: str, entries: dict) -> list[str]:
    """An entry without a type among components is a misspelt name: it was to change the one that is there."""
    components = [name for name, value in entries.items() if isinstance(value, dict) and 'type' in value]
    return [f'{path}.{name} has no type, and {_unknown(name, components, "is there")}'
            for name, value in entries.items()
            if components and isinstance(value, dict) and value and 'type' not in value]


def _option_problems(cfg: Config, options: dict) -> list[str]:
    types = {path.rpartition('.')[0]: value for path, value in options.items() if path.endswith('.type')}
    scope = cfg.get('default_scope') or 'mmengine'
    read = dict(cfg.items())
    if options.get('runner_type', cfg.get('runner_type')) == 'mmhdistill.ResumableRunner':
        read['default_hooks'] = {**DEFAULT_HOOKS, **(cfg.get('default_hooks') or {})}
    problems = []
    for path in options:
        problem = _path_problem(path, read, types, scope)
        problems += [f'--cfg-options {path}: {problem}'] if problem else []
    return problems


def _path_problem(path: str, cfg: dict, types: dict[str, str], scope: str) -> str:
    """Why ``path`` leads nowhere in ``cfg``, or ''."""
    first, *rest = keys = path.split('.')
    if odd := re.search(r'''[^\w /:*+-]''', path.replace('.', '')):
        return f'{odd[0]!r} cannot be in the name of a setting'
    if first not in READ and first not in cfg:
        return _unknown(first, READ | set(cfg), 'is read')
    node, at = cfg.get(first, {}), first
    for depth, key in enumerate(rest, 1):
        if isinstance(node, (list, tuple)):
            if not (key.isdigit() and int(key) < len(node)):
                return f"{at} is a list of {len(node)}, counted from 0: '{key}' is none of them"
            node = node[int(key)]
        elif not isinstance(node, dict):
            return f'{at} is {node!r} in the config, which has no settings: set {at} itself'
        elif key in node:
            node = node[key]
        else:
            problem = _new_key_problem(key, node, at, keys[:depth + 1], types, scope, last=depth == len(rest))
            if problem:
                return f'{at}: {problem}'
            node = {}
        at = f'{at}.{key}'
    return ''


def _new_key_problem(key: str, node: dict, at: str, path: list[str], types: dict[str, str], scope: str,
                     last: bool) -> str:
    """Why ``key`` cannot be added to the settings ``node``, or ''."""
    kind = types.get(at, node.get('type'))
    known = _arguments(_find(kind, scope)) if kind is not None else _section(at)
    if known is not None:
        return '' if key in known else _unknown(key, known)
    if '.'.join(path) in types:
        return ''  # a new component
    components = [name for name, value in node.items() if isinstance(value, dict) and 'type' in value]
    if components and not last:
        return _unknown(key, components, 'is there') + ' (a new one needs a type)'
    return _unknown(key, node, 'is there') if difflib.get_close_matches(key, map(str, node), 1, _ALIKE) else ''


def _section(path: str) -> set[str] | None:
    """Keys of a part of the config that has no type of its own; None where any key may be added."""
    first, _, rest = path.partition('.')
    if rest:
        return _fields(path.rpartition('.')[2])
    if first.endswith('_dataloader'):
        return _call_arguments(DataLoader) | {'batch_sampler', 'dataset', 'num_batch_per_epoch', 'sampler'}
    return {
        'auto_scale_lr': {'base_batch_size', 'enable'},
        'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
        'log_processor': _call_arguments(LogProcessor),
        'optim_wrapper': _call_arguments(OptimWrapper) | _TAKEN['optim_wrapper'] | {'type'},
        'randomness': _call_arguments(set_random_seed),
        'test_cfg': _call_arguments(TestLoop) | {'type'},
        'train_cfg': _call_arguments(EpochBasedTrainLoop) | _call_arguments(IterBasedTrainLoop) | {'by_epoch', 'type'},
        'val_cfg': _call_arguments(ValLoop) | {'type'},
    }.get(first)


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


def _find(kind, scope: str) -> list[tuple[object, str]]:
    """What ``kind``, a name of a registry or the thing itself, may stand for, each with the kind of registry."""
    if not isinstance(kind, str):
        return [(kind, '')] if callable(kind) else []
    prefix, _, name = kind.rpartition('.')
    if '.' in prefix:  # path of a class
        with contextlib.suppress(ImportError, AttributeError):
            return [(getattr(importlib.import_module(prefix), name), '')]
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
                        found.append((registry.module_dict[name], root.name))
                        break
    return found


def _registered() -> set[str]:
    from .. import registry
    ours = [value for value in vars(registry).values() if isinstance(value, Registry) and value.scope == _SCOPE]
    for each in ours:
        each.import_from_location()
    return {name for each in ours for name in each.module_dict}


def _arguments(found: list[tuple[object, str]]) -> set[str] | None:
    """Keys that the settings of a component may have; None where that is not known."""
    parts = [_call_arguments(target) for target, _ in found]
    if not parts or None in parts:
        return None
    return _ALWAYS.union(*parts, *(_TAKEN.get(registry, ()) for _, registry in found))


def _call_arguments(target) -> set[str] | None:
    """Names of what ``target`` takes. ``**kwargs`` of ours are the base class's; others' may be anything: None."""
    if not inspect.isclass(target):
        parameters = inspect.signature(target).parameters.values()
        return None if _is_open(parameters) else _names(parameters)
    names: set[str] = set()
    for base in target.__mro__:
        if base is object or '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        names |= _names(parameters) - {'self'}
        if not _is_open(parameters):
            return names
        if not _is_ours(target):
            return None
    return names


def _is_open(parameters: Iterable[inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _names(parameters: Iterable[inspect.Parameter]) -> set[str]:
    return {parameter.name for parameter in parameters
            if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)}


def _unknown(key: str, known: Iterable[str], what: str = 'is taken') -> str:
    """Sentence on a key that is not in ``known``."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(key), known, n=1)
    meant = f"did you mean '{close[0]}'? " if close else ''
    there = ', '.join(name for name in known if name not in _ALWAYS) or 'nothing'
    return f"no '{key}' {what}: {meant}There is {there}"
