"""The config text that a Runner keeps in its checkpoints, read as data."""
import ast


def read_config_text(text: str) -> dict:
    """Top-level settings of ``Config.pretty_text``; those that are no plain data are left out.

    mmengine reads such a text by running it. That of a checkpoint may be anybody's, so it is only parsed: numbers,
    strings, lists, tuples, dicts and calls of ``dict``.

    Raises:
        ValueError: no Python.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f'is no config that can be read ({error})') from error
    settings = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                settings[node.targets[0].id] = _value(node.value)
            except (ValueError, TypeError):
                continue
    return settings


def _value(node: ast.expr):
    if isinstance(node, ast.List | ast.Tuple):
        values = [_value(item) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        # Keys that are no identifiers are written dict({'a-b': 1}).
        parts = [_value(part) for part in node.args] + [
            {item.arg: _value(item.value)} if item.arg else _value(item.value) for item in node.keywords]
        return {key: value for part in parts for key, value in part.items()}
    return ast.literal_eval(node)
