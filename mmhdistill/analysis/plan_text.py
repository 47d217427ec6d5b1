"""The facts of :func:`mmhdistill.analysis.plan.plan` for readers."""
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

_BYTES = dict(GiB=2**30, MiB=2**20, KiB=2**10)
_FLOPS = dict(GFLOPs=1e9, MFLOPs=1e6)


def as_text(plan: dict, assumed: bool = False) -> str:
    """
    Args:
        assumed: TFLOP/s are the default, and not what the user gave.
    """
    sections = {
        'What is aligned': _aligned(plan),
        'Parameters': _parameters(plan),
        'Arithmetic of a training step, an image': _flops(plan),
        f'Memory of a GPU, estimated: {plan["time"]["batch"]} images, '
        f'{"mixed precision" if plan["memory"]["precision"] == 16 else "float32"}': _memory(plan),
        'Time': _time(plan, assumed),
        'Disk': _disk(plan),
    }
    lines = [plan['config']]
    for title, body in sections.items():
        lines += ['', title, *body]
    for note in plan['notes']:
        lines += ['', *textwrap.wrap(f'Note: {note}', 120, break_on_hyphens=False)]
    return '\n'.join(lines)


def _aligned(plan: dict) -> list[str]:
    student, rows = plan['student'], []
    rows.append(('images', f'{_size(student["image_size"])} px, {_normalisation(student)}'))
    rows.append(('student', f'{_layers(student)}; {_grid(student["grid"])} patches of {student["patch_size"]} px, '
                 f'extra tokens: {student["extra_tokens"]}'))
    for name, teacher in plan['teachers'].items():
        sees = f'{_size(teacher["image_size"])} px' + (' (resized)' if teacher['resized'] else '')
        patches = 'the kept patches alone of ' if teacher['masked'] else ''
        colours = "normalised as the student's"
        if teacher['renormalised']:
            colours = f're-normalised to {_normalisation(teacher)}'
        rows.append((name, f'{teacher["model"]}, {_layers(teacher)}; sees {sees}, {patches}{_grid(teacher["grid"])} '
                     f'patches of {teacher["patch_size"]} px, {colours}; positions {teacher["positions"]}'))
    rows.append(('masker', _masker(plan['masker'], plan['student'])))
    rows += [(name, _loss(loss, plan['student'])) for name, loss in plan['losses'].items()]
    return _rows(rows)


def _layers(model: dict) -> str:
    return (f'runs layers 0 to {model["deepest_layer"]} of {model["depth"]} (width {model["width"]}, {model["heads"]} '
            'heads)')


def _masker(masker: dict | None, student: dict) -> str:
    patches = student['grid'][0] * student['grid'][1]
    if masker is None:
        return f'none: the student is fed all {patches} patches'
    low, high = masker['keep_rate_range']
    rate = f'{masker["keep_rate"]:g}' if low == high else f'{masker["keep_rate"]:g} at the end ({low:g} to {high:g})'
    owner = f"teacher '{masker['teacher']}'" if masker['teacher'] else 'the student'
    reads = f' on layers {_join(masker["scored_layers"])} of {owner}' if masker['scored_layers'] else ''
    seen, layer = [], 0
    for count, group in groupby(masker['kept_by_layer']):
        number = len(list(group))
        seen.append(f'layers {layer} to {layer + number - 1} see {count}')
        layer += number
    return (f'{masker["place"]}: {masker["scorer"]}{reads}, keep rate {rate} a stage; {patches} patches become '
            f'{_join(masker["counts"])}; of the student {", ".join(seen)}')


def _loss(loss: dict, student: dict) -> str:
    ours, theirs = ([pair[side] for pair in loss['layers']] for side in (0, 1))
    what = 'relations ' + _kinds(loss['kinds']) if 'kinds' in loss else 'features'
    grid, other = loss['grid'], loss['teacher_grid']
    resampled = '' if grid == other else f' (resampled from {_grid(grid)} to {_grid(other)})'
    settings = [f'{key} {value}' for key, value in loss.items() if key in (
        'distance', 'relation_heads', 'temperature', 'include_extra', 'include_cls', 'normalize_target')]
    return (f'{loss["weight"]:g} x {loss["type"]}: {what} of layers {_join(ours)} of the student and {_join(theirs)} '
            f"of teacher '{loss['teacher']}', at {_join(sorted(set(loss['tokens'])))} patches{resampled}; "
            f'{", ".join(settings)}')


def _kinds(kinds: dict[str, float]) -> str:
    return ' + '.join(kind if weight == 1 else f'{weight:g} {kind}' for kind, weight in kinds.items())


def _parameters(plan: dict) -> list[str]:
    found = plan['parameters']
    rows = [('student', found['student']), ('  trained', found['trained']), ('  frozen', found['frozen'])]
    rows += [(f"loss '{name}'", count) for name, count in found['losses'].items()]
    rows += [(f"teacher '{name}'", count) for name, count in found['teachers'].items()]
    return _columns([(name, (f'{count / 1e6:.2f} M', )) for name, count in rows])


def _flops(plan: dict) -> list[str]:
    ramp = plan['masker'] and plan['masker']['keep_rate_range'][0] < plan['masker']['keep_rate_range'][1]
    ways = [{
        'student, forward': way['student_forward'], 'student, backward': way['student_backward'],
        **{f"teacher '{name}'": x for name, x in way['teachers'].items()},
        **{f"loss '{name}'": x for name, x in way['losses'].items()}, 'total': way['total']
    } for way in (plan['flops']['this'], plan['flops']['naive'])]
    rows = [('', ('mean over training' if ramp else 'this run', 'naive'))]
    form = _in_unit_of(ways[0]['total'], _FLOPS)
    rows += [(name, [form(way[name]) for way in ways]) for name in ways[0]]
    return _columns(rows) + [
        f'  {plan["flops"]["ratio"]:.2f} of the naive way: a student that is fed every patch, teachers that run to '
        'their end.',
        '  Linear layers and attention, two FLOPs per multiply-add; backward is taken as two forwards, three with',
        '  with_cp=True. Losses with their projectors, forward and backward.']


def _memory(plan: dict) -> list[str]:
    found, batch, width = plan['memory'], plan['time']['batch'], plan['student']['width']
    labels = dict(
        weights='weights of student and projectors', gradients='their gradients', buckets="DDP's copy of the gradients",
        optimizer='states of the optimizer', half_weights='weights in 16 bits', teachers='weights of the teachers',
        images='images', teacher_outputs='what is read of the teachers',
        student=f'student, kept for backward: {batch} images x {found["tokens"]} tokens, of all its layers, x width '
                f'{width} x {found["bytes_per_value"]:.1f} bytes',
        losses='losses, kept for backward', total='total')
    form = _in_unit_of(found['total'], _BYTES)
    return _columns([(label, (form(found[key]), )) for key, label in labels.items() if found[key]]) + [
        '  Not in it: the CUDA context, what kernels need while they run, what the allocator holds.']


def _time(plan: dict, assumed: bool) -> list[str]:
    run = plan['time']
    accumulated = f' x {run["accumulated"]} accumulated' if run['accumulated'] > 1 else ''
    gpus = '1 GPU' if run['gpus'] == 1 else f'{run["gpus"]} GPUs'
    lines = [f'  {gpus} x {run["batch"]} images{accumulated} = {run["images_per_step"]} images a step'
             + (f', learning rate {run["lr"]:g}' if run['lr'] else '')]
    number = 'unknown number of' if run['images'] is None else f'{run["images"]:,}'
    lines.append(f'  {number} images an epoch ({run["images_source"]})')
    if run['iterations_per_epoch']:
        lines.append(f'  {run["epochs"]:g} epochs of {run["iterations_per_epoch"]:,} iterations')
    source = ', an assumption: give --tflops' if assumed else ''
    if run['iterations']:
        lines.append(f'  {run["iterations"]:,} iterations: {_duration(run["seconds"])} of arithmetic, at '
                     f'{run["tflops"]:g} TFLOP/s per GPU{source}')
    return [
        *lines, f'  A GPU takes {run["images_per_second"]:,.0f} images a second then; fewer where its data come later']


def _disk(plan: dict) -> list[str]:
    disk = plan['disk']
    each, kept = disk['checkpoint'], disk['checkpoints']
    total = 'all that are written are kept' if kept is None else f'{kept} kept: {_bytes(kept * each)}'
    rows = [('checkpoints', f'{_bytes(each)} each, with the states of the optimizer; {total}')]
    if disk['logs']:
        rows.append(('logs', f'about {_bytes(disk["logs"])}'))
    if plan['student']['starts_from'] != 'random weights':
        rows.append(('student', f'starts from {plan["student"]["starts_from"]}'))
    rows += [(f"teacher '{name}'", f'about {_bytes(teacher["bytes"])} by its parameters; {teacher["weights"]}')
             for name, teacher in plan['teachers'].items()]
    return _rows(rows)


def _rows(rows: list[tuple[str, str]]) -> list[str]:
    """Name and text, which is broken into lines."""
    width, lines = max(len(name) for name, _ in rows), []
    for name, text in rows:
        lines += textwrap.wrap(text, 120, initial_indent=f'  {name:<{width}}  ', subsequent_indent=' ' * (width + 4),
                               break_long_words=False, break_on_hyphens=False)
    return lines


def _columns(rows: list[tuple[str, Sequence[str]]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows))]
    return [f'  {name:<{width}}  ' + '  '.join(f'{cell:>{wide}}' for cell, wide in zip(cells, widths))
            for name, cells in rows]


def _in_unit_of(total: float, units: dict[str, float]) -> Callable[[float], str]:
    """What writes numbers in the unit that fits their total."""
    unit, size = next(((unit, size) for unit, size in units.items() if total >= size), list(units.items())[-1])
    return lambda value: f'{value / size:.2f} {unit}'


def _bytes(value: float) -> str:
    return _in_unit_of(value, _BYTES)(value)


def _duration(seconds: float) -> str:
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:.1f} {unit}'
    return f'{seconds:.1f} seconds'


def _normalisation(model: dict) -> str:
    return ', '.join(f'{key} {" ".join(f"{x:.2f}" for x in model[key])}' for key in ('mean', 'std'))


def _size(size: Sequence[int]) -> str:
    return f'{size[1]}x{size[0]}'


def _grid(grid: Sequence[int]) -> str:
    return 'x'.join(map(str, grid))


def _join(values: Iterable[int]) -> str:
    return ', '.join(map(str, values))
