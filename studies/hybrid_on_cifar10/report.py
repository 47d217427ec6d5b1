"""Tables, figures and verdicts of the study, from its results, into its README.

    python studies/hybrid_on_cifar10/report.py cpu

Results in work_dirs/ take the place of those in the study's folder; without them the latter are told anew.
"""
import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import mean, median, stdev

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from studies.hybrid_on_cifar10.claims import LABELS, UNITS, Results, claims, judge  # noqa: E402

COLUMNS = {'knn': 'k-NN %', 'knn_cls': 'of CLS', 'linear': 'linear %', 'finetune': 'fine-tuned %', 'nmi': 'NMI',
           'distance': 'distance, px'}
TEACHERS = {name: label if name.endswith('longer') else f'teacher: {label}' for name, label in LABELS.items()}


def load(folder: Path) -> tuple[Results, dict[str, list[dict]], list[dict]]:
    """Results of the methods, runs of the sweep by cell, and with what both were made."""
    runs, sweep, made_with = {}, {}, []
    for path in sorted(folder.glob('*.json')):
        run = json.loads(path.read_text())
        if run['made_with'] not in made_with:
            made_with.append(run['made_with'])
        if path.name == 'cost.json':
            costs = run['cells']
            continue
        (sweep if run['grid'] == 'sweep' else runs).setdefault(run['cell'], []).append(run)
    # Of the same weights: only the fine-tuning is another.
    runs['random weights, longer'] = [
        dict(seed=random['seed'], finetune=random['finetune_longer'],
             right=dict(finetune=random['right']['finetune_longer']))
        for random in runs['random weights']]
    first, = (run for run in runs['Hybrid, input mask'] if run['seed'] == 0)
    sweep['kl 0.3'] = [first]
    return Results(runs, costs), sweep, made_with


def order(results: Results) -> list[str]:
    """Pixels, random weights, teachers, methods as the costs have them."""
    return ['raw pixels', 'random weights', 'random weights, longer', *TEACHERS, *results.costs]


def number(values: list[float], measure: str) -> str:
    form = '.3f' if measure == 'nmi' else '.1f'
    text = f'{mean(values):{form}}'
    if len(values) > 1:
        text += f' ± {stdev(values):{form}}'
    return text


def table(rows: list[list[str]]) -> str:
    head, *body = [f'| {" | ".join(row)} |' for row in rows]
    return '\n'.join([head, '|---|' + '---:|' * (len(rows[0]) - 1), *body])


def methods(results: Results) -> str:
    rows = [['', *COLUMNS.values(), 'ms a step', 'MiB']]
    for cell in order(results):
        rows.append([TEACHERS.get(cell, cell)])
        for measure in COLUMNS:
            known = measure in results.runs[cell][0]
            rows[-1].append(number(results.values(cell, measure), measure) if known else '')
        cost = results.costs.get(cell)
        rows[-1] += [f'{median(cost[what]):.0f} ({min(cost[what]):.0f} to {max(cost[what]):.0f})' if cost else ''
                     for what in ('ms', 'mib')]
    return table(rows)


def sweep_table(sweep: dict[str, list[dict]]) -> str:
    found = Results(sweep, {})
    rows = [['relations', *COLUMNS.values(), 'gradient, relations / features']]
    for cell in sorted(sweep, key=lambda cell: (cell.split()[0], float(cell.split()[1]))):
        rows.append([cell, *(number(found.values(cell, measure), measure) for measure in COLUMNS),
                     f'{mean(found.values(cell, "gradient_ratio")):.2f}'])
    return table(rows)


def verdicts(results: Results) -> str:
    depth = len(results.runs['mae'][0]['nmi'])
    rows = [['claim', 'verdict', 'measured']]
    for claim, parts in claims(depth).items():
        verdict, measured = judge(results, parts)
        rows.append([claim, f'**{verdict}**', '; '.join(measured)])
    return table(rows).replace('---:|---:', '---|---')


def render(folder: Path) -> str:
    """What stands between the marks of the README."""
    results, sweep, made_with = load(folder)
    name = folder.name
    how = '\n'.join(f'- {made["date"]}: {made["machine"]}; {made["versions"]}; images of sha256 {made["images"]}'
                    for made in sorted(made_with, key=lambda made: made['date']))
    return f"""{methods(results)}

![Accuracy of every method](results/{name}/accuracy.png)

![NMI and attention distance by layer](results/{name}/layers.png)

{verdicts(results)}

The weight and the distance of the relations, one seed, otherwise *Hybrid, input mask*:

{sweep_table(sweep)}

Measured by `bash studies/hybrid_on_cifar10/run.sh {name}`, with

{how}"""


def marks(size: str) -> tuple[str, str]:
    return f'<!-- results of {size} -->', f'<!-- end of results of {size} -->'


def digest(folder: Path) -> str:
    """Of the results, which a figure has among its meta data."""
    return hashlib.sha256(b''.join(path.read_bytes() for path in sorted(folder.glob('*.json')))).hexdigest()


def draw(folder: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import torch
    from matplotlib import pyplot as plt

    from mmhdistill.functional import attention_distance
    from mmhdistill.models.losses.token_relation_loss import default_layer_pairs
    results, _, _ = load(folder)
    uniform = float(attention_distance(torch.full((1, 1, 64, 64), 1 / 64), (8, 8), 4))
    made_of = dict(dpi=200, metadata={'results': digest(folder)})
    # At the size of a page of two columns, where they are read: 6.75 in.
    style = {'font.size': 7.5, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
             'lines.linewidth': 1.2, 'lines.markersize': 4}
    # A student of features alone beside that of features and relations, below the teachers.
    lines = {'random weights': ('#999999', ':', '.'), 'supervised': ('#E69F00', '--', 's'),
             'moco': ('#CC79A7', '--', '^'), 'mae': ('#0072B2', '--', 'D'),
             'FD': ('#D55E00', '-', 'v'), 'FD of MoCo': ('#000000', '-', 'P'),
             'Hybrid, no mask': ('#009E73', '-', 'o'), 'Hybrid of MoCo, no mask': ('#56B4E9', '-', 'X')}
    panels = {'nmi': 'NMI of queries and keys', 'distance': 'attention distance (px)'}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(6.75, 2.9), layout='constrained')
        for ax, (measure, label) in zip(axes, panels.items()):
            for cell, (colour, line, marker) in lines.items():
                layers = range(len(results.runs[cell][0][measure]))
                seeds = [results.values(cell, measure, layer) for layer in layers]
                ax.plot(layers, [mean(values) for values in seeds], line, color=colour, marker=marker,
                        label=TEACHERS.get(cell, cell))
                ax.fill_between(layers, [min(values) for values in seeds], [max(values) for values in seeds],
                                color=colour, alpha=0.2, linewidth=0)
            trained = [student for student, _ in default_layer_pairs(len(layers), len(layers))]
            ax.axvspan(trained[0] - 0.5, trained[-1] + 0.5, color='#000000', alpha=0.07, linewidth=0,
                       label='layers of the relation loss')
            if measure == 'distance':
                ax.axhline(uniform, color='#000000', linewidth=0.8, label='uniform attention')
            ax.set_xlabel('layer')
            ax.set_ylabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.25)
        figure.legend(*axes[1].get_legend_handles_labels(), loc='outside upper center', ncols=4)
        figure.savefig(folder / 'layers.png', **made_of)
        cells = order(results)
        figure, axes = plt.subplots(1, 3, figsize=(6.75, 3.7), sharey=True, layout='constrained')
        for ax, measure in zip(axes, ('knn', 'linear', 'finetune')):
            for index, cell in enumerate(cells):
                values = [run[measure] for run in results.runs[cell] if measure in run]
                if not values:
                    continue
                colour = '#0072B2' if cell in results.costs else '#777777'
                ax.plot(values, [index] * len(values), 'o', color=colour, alpha=0.7)
                ax.plot([mean(values)] * 2, [index - 0.3, index + 0.3], color='#D55E00', linewidth=1.5)
            ax.set_xlabel(f'{UNITS[measure]}, accuracy (%)')
            ax.grid(axis='x', alpha=0.25)
        axes[0].set_yticks(range(len(cells)), [TEACHERS.get(cell, cell) for cell in cells])
        axes[0].invert_yaxis()
        figure.savefig(folder / 'accuracy.png', **made_of)
        plt.close('all')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('size', choices=['cpu', 'gpu'])
    size = parser.parse_args().size
    folder, readme = HERE / 'results' / size, HERE / 'README.md'
    if (found := Path('work_dirs/results', size)).exists():
        if not (found / 'cost.json').exists():
            raise SystemExit(f'{found} is not finished, it has no cost.json: run.sh goes on with it.')
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(found, folder, ignore=lambda _, names: [name for name in names if not name.endswith('.json')])
    begin, end = marks(size)
    text = readme.read_text()
    readme.write_text(re.sub(f'{begin}.*?{end}', lambda _: f'{begin}\n{render(folder)}\n{end}', text, flags=re.DOTALL))
    draw(folder)
    print(render(folder))


if __name__ == '__main__':
    main()
