import json
import sys
from pathlib import Path
from threading import Barrier, Event

import pytest
from filelock import FileLock
from mmengine.config import Config

from mmhdistill.analysis import ablation
from mmhdistill.analysis.ablation import as_markdown, metric_names, plan, run_grid, summarise, write
from tests.helpers import log_messages

ROWS = [dict(cell='a', seed=0, minutes=1.0, knn=50.0), dict(cell='a', seed=1, minutes=2.0, knn=54.0),
        dict(cell='b', seed=0, minutes=3.0, knn=61.0)]


def test_summarise__mean_and_sample_deviation():
    a, b = summarise(ROWS)
    assert (a['cell'], a['runs'], a['knn'][0], a['minutes'][0]) == ('a', 2, 52.0, 1.5)
    # Of 50 and 54 with one degree of freedom.
    assert a['knn'][1] == pytest.approx(8**0.5)
    assert (b['runs'], b['knn']) == (1, (61.0, None))
    assert metric_names(ROWS) == ['knn', 'minutes']


def test_as_markdown__one_row_per_cell():
    assert as_markdown(ROWS) == ('| cell | runs | knn | minutes |\n|---|---:|---:|---:|\n'
                                 '| a | 2 | 52 ± 2.828 | 1.5 ± 0.7071 |\n| b | 1 | 61 | 3 |\n')


def test_write__one_csv_line_per_run(tmp_path):
    write(ROWS, tmp_path)
    assert (tmp_path / 'table.csv').read_text().splitlines() == [
        'cell,seed,knn,minutes', 'a,0,50.0,1.0', 'a,1,54.0,2.0', 'b,0,61.0,3.0']
    assert (tmp_path / 'table.md').read_text() == as_markdown(ROWS)
    assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


def test_as_markdown__metrics_between_0_and_1_and_names_of_many_kinds():
    rows = [dict(cell='a|b', seed=0, minutes=1234.5, iou=0.412), dict(cell='2', seed=0, minutes=1.0, iou=0.414)]
    assert as_markdown(rows).splitlines()[2:] == [r'| a\|b | 1 | 0.412 | 1234 |', '| 2 | 1 | 0.414 | 1 |']


def test_table__union_of_metrics_nan_and_failures(tmp_path):
    rows = [dict(cell='a', seed=0, x=float('nan'), minutes=1.0), dict(cell='a', seed=1, x=1.0),
            dict(cell='b', seed=0, y=2.0, minutes=3.0), dict(cell='b', seed=1, failed='why'),
            dict(cell='c', seed=0, failed='why')]
    write(rows, tmp_path)
    assert (tmp_path / 'table.md').read_text().splitlines() == [
        '| cell | runs | x | y | minutes |', '|---|---:|---:|---:|---:|', '| a | 2 | nan ± nan |  | 1 |',
        '| b | 1, 1 failed |  | 2 | 3 |', '| c | 0, 1 failed | failed | failed | failed |']
    assert (tmp_path / 'table.csv').read_text().splitlines() == [
        'cell,seed,x,y,minutes', 'a,0,nan,,1.0', 'a,1,1.0,,', 'b,0,,2.0,3.0', 'b,1,failed,failed,failed',
        'c,0,failed,failed,failed']
    assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


def test_write__nothing_finished(tmp_path):
    write([dict(cell='a', seed=0, failed='why')], tmp_path)
    assert (tmp_path / 'table.csv').read_text().splitlines() == ['cell,seed,minutes', 'a,0,failed']
    assert not (tmp_path / 'figure.png').exists()


RECIPE = """
size = 3
model = dict(type='X', losses=dict(a=1, b=2), masker=dict(keep_rate=size), hooks=[dict(type='A'), 2])
test_cfg = test_dataloader = test_evaluator = dict(type='Y')
randomness = dict(seed=0)
default_hooks = dict(checkpoint=dict(type='CheckpointHook'))
"""


@pytest.fixture
def grid(tmp_path):
    """Writes a grid of ``cells``, which finds its recipe in its own folder."""
    (tmp_path / 'recipe.py').write_text(RECIPE)

    def write_grid(cells, seeds='[0]'):
        path = tmp_path / 'grid.py'
        path.write_text(f"config = 'recipe.py'\nseeds = {seeds}\ncells = {cells}\n")
        return path
    return write_grid


@pytest.fixture
def trainer(monkeypatch):
    """In place of the tools: what they leave. Set ``metrics``, or cells' names in ``broken``."""
    class Trainer:
        metrics, broken, called = {'knn': 0.5}, (), []

        def __call__(self, command, log, share, stop):
            self.shares.append(share)
            self.called.append([str(word) for word in command])
            log.write_text('called')
            if log.parent.parent.name in self.broken:
                raise RuntimeError(f'broken; its log is {log}')
            if log.name == 'train.log':
                (log.parent / 'last_checkpoint').write_text('epoch_1.pth')
            else:
                (log.parent / 'tested.json').write_text(json.dumps(self.metrics))
    trainer = Trainer()
    trainer.called, trainer.shares = [], []
    monkeypatch.setattr(ablation, '_call', trainer)
    return trainer


MERGED = r"cell 'b' cannot be merged into .*recipe\.py: the config has settings that nothing would read:\n"


@pytest.mark.parametrize('cells, message', [
    # One sentence, and not one for each setting in it.
    ("dict(b=dict(modle=dict(type='Z', c=1)))", rf"{MERGED}no 'modle' is read: did you mean 'model'\? .*\Z"),
    ("dict(b=dict(losses=dict(a=3)))", rf"{MERGED}no 'losses' is read: There is .*\Z"),
    ("dict(b={'modle.type': 'Z'})", rf"{MERGED}no 'modle' is read: did you mean 'model'\?"),
    ("dict(b=dict(train_dataloader=dict(batchsize=5)))",
     rf"{MERGED}train_dataloader: no 'batchsize' is taken: did you mean 'batch_size'\?"),
    ("dict(b={'train_dataloader': {'sampler': {'type': 'DefaultSampler', 'shufle': True}}})",
     rf"{MERGED}train_dataloader.sampler: no 'shufle' is taken: did you mean 'shuffle'\?"),
    ("dict(b={'default_hooks.checkpont': dict(interval=1)})",
     rf"{MERGED}default_hooks: no 'checkpont' is there: did you mean 'checkpoint'\?"),
    ("dict(b=dict(model=dict(masker=dict(_delete_=True, type='mmhdistill.RandomScorer', seed=1))))",
     rf"{MERGED}model.masker: no 'seed' is taken: There is nothing"),
    ("dict(b=dict(custom_hooks=[dict(type='mmhdistill.DiversityReportHook', intervall=1)]))",
     rf"{MERGED}custom_hooks.0 is a \S+, and no 'intervall' is taken: did you mean 'interval'\?"),
    ("dict(b=dict(size=4))", r"cell 'b' trains what the recipe itself"),
    ("dict(a=dict(), b=dict(model=dict(type='X')))", r"cell 'b' trains what cell 'a' and the recipe itself"),
    ("dict(a=dict(model=dict(masker=None)), b={'model.masker': None})", r"cell 'b' trains what cell 'a' trains"),
    ("dict(a=dict(), b=dict(randomness=dict(seed=5)))", r"cell 'b' trains what cell 'a'"),
    ("dict(a=dict(), b=None)", r"cell 'b' is None: give a dict"),
    ("dict(a=dict(), b=dict(model=dict(type=dict(z=1))))", rf"{MERGED}model.type is 'X' in the config"),
    ("dict(a=dict(), b=dict(model=dict(hooks={7: 1})))", r"cell 'b' cannot be merged into .*recipe\.py"),
    ("{'a b': dict(), 'a-b': dict(test_cfg=dict(z=1))}",
     r"cell 'a-b' would have the folder 'a-b', and so has cell 'a b'"),
    ("{'a': dict(), '+': dict(test_cfg=dict(z=1))}", r"cell '\+' would have the folder '': rename it"),
    ("dict(a=dict(), b=dict(test_evaluator=None))", r"cell 'b' of .*recipe\.py has no test_evaluator"),
    ("dict()", r"cells of .* are \{\}: give a dict"),
    ("['a']", r"cells of .* are \['a'\]: give a dict"),
])
def test_run_grid__cell_that_cannot_give_a_right_table(grid, trainer, tmp_path, cells, message):
    with pytest.raises(ValueError, match=message):
        run_grid(grid(cells), tmp_path / 'out')
    assert not trainer.called and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('seeds', ['[]', '3', '[0, 0]', "['a']"])
def test_run_grid__seeds(grid, tmp_path, seeds):
    with pytest.raises(ValueError, match=r'seeds of .*: give a list of different integers'):
        run_grid(grid('dict(a=dict())', seeds), tmp_path / 'out')


def test_plan__names_of_every_runner_and_numbers_as_names(grid, tmp_path):
    cells = "{1: dict(custom_hooks=[]), 0.5: dict(val_cfg=dict(fp16=True)), 'c': dict(param_scheduler=[]), 'd': dict()}"
    runs = plan(grid(cells, '[0, 4]'), tmp_path)
    assert [run.cell for run in runs] == ['1', '1', '0.5', '0.5', 'c', 'c', 'd', 'd']
    assert [str(run.folder.relative_to(tmp_path)) for run in runs[1:3]] == ['1/seed-4', '0-5/seed-0']
    assert 'custom_hooks = []' in runs[1].recipe and 'seed=4' in runs[1].recipe


def test_plan__what_a_cell_may_hold(grid, tmp_path):
    cells = """{
        'new': dict(model=dict(losses=dict(c=dict(type='mmhdistill.FeatureLoss', teacher='t')))),
        'other': dict(model=dict(losses=dict(_delete_=True, c=1))),
        'list': dict(model=dict(hooks={'0': dict(type='Z')})),
        'names': {'optim_wrapper.paramwise_cfg': dict(custom_keys={'.ln': dict(decay_mult=0), 'x': 1})},
        'both ways': {'model': dict(masker=None), 'model.hooks': []},
    }"""
    runs = plan(grid(cells, '[0, 1]'), tmp_path)
    # The second seed's recipe is the first's.
    found = [Config.fromstring(run.recipe, '.py').to_dict() for run in runs]
    assert [cfg.pop('randomness') for cfg in found] == [dict(seed=0), dict(seed=1)] * 5
    assert found[::2] == found[1::2]
    new, other, in_list, names, both = map(Config, found[::2])
    assert new.model.losses == dict(a=1, b=2, c=dict(type='mmhdistill.FeatureLoss', teacher='t'))
    assert other.model.losses == dict(c=1)
    assert in_list.model.hooks == [dict(type='Z'), 2]
    assert names.optim_wrapper.paramwise_cfg.custom_keys == {'.ln': dict(decay_mult=0), 'x': 1}
    assert (both.model.masker, both.model.hooks, both.model.losses) == (None, [], dict(a=1, b=2))


def test_plan__warns_once_a_cell(grid, tmp_path):
    with log_messages() as messages:
        plan(grid('dict(a=dict(default_hooks=dict(checkpoint=dict(intervall=1))))', '[0, 1]'), tmp_path)
    message, = messages
    assert "no 'intervall' is known: did you mean 'interval'?" in message


def test_plan__shipped_grid_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = plan('mmhdistill::ablations/quickstart.py', tmp_path / 'out')
    assert [run.folder.parent.name for run in runs[::2]] == ['features', 'relations', 'both', 'both-masked']


def test_run_grid__failed_run_leaves_the_others(grid, trainer, tmp_path):
    out, cells = tmp_path / 'out', 'dict(a=dict(), b=dict(model=dict(masker={})), c=dict(model=dict(hooks=None)))'
    trainer.broken = ['b']
    rows = run_grid(grid(cells.format(8)), out)
    assert [row.get('knn') for row in rows] == [0.5, None, 0.5]
    assert rows[1]['failed'] == f'broken; its log is {out}/b/seed-0/train.log'
    # Corrected, and its time is that of the new config.
    (out / 'b/seed-0/minutes').write_text('500')
    trainer.broken, trainer.called = [], []
    rows = run_grid(grid(cells.format(9)), out)
    assert [row['knn'] for row in rows] == [0.5] * 3
    assert rows[1]['minutes'] < 1
    assert {Path(command[2]) for command in trainer.called} == {out / 'b/seed-0.py'}
    assert 'masker=9' in (out / 'b/seed-0.py').read_text()


def test_run_grid__run_of_another_config_is_told_before_any_run(grid, trainer, tmp_path):
    out = tmp_path / 'out'
    run_grid(grid('dict(b=dict())'), out)
    trainer.called.clear()
    with pytest.raises(ValueError, match=r'b/seed-0 holds a run of another config, .*b/seed-0\.py: move both away'):
        run_grid(grid('dict(a=dict(), b=dict(model=dict(masker=None)))'), out)
    assert not trainer.called


def test_run_grid__metrics_that_are_no_numbers(grid, trainer, tmp_path):
    trainer.metrics = dict(knn=float('nan'), confusion=[[1, 2]], name='x')
    row, = run_grid(grid('dict(a=dict())'), tmp_path / 'out')
    assert set(row) == {'cell', 'seed', 'minutes', 'knn'} and row['knn'] != row['knn']
    for nothing in ({}, None, dict(name='x')):
        trainer.metrics = nothing
        row, = run_grid(grid('dict(a=dict())'), tmp_path / f'out-{nothing and "x"}')
        assert row['failed'].startswith('test_evaluator gave no number to compare runs by')


def test_run_grid__finished_before(grid, trainer, tmp_path):
    folder = tmp_path / 'out/a/seed-0'
    run, = plan(grid('dict(a=dict())'), tmp_path / 'out')
    folder.mkdir(parents=True)
    folder.with_suffix('.py').write_text(run.recipe)
    (folder / 'metrics.json').write_text('{"minutes": 3.5, "knn": 0.25}\n')
    assert run_grid(grid('dict(a=dict())'), tmp_path / 'out') == [dict(cell='a', seed=0, minutes=3.5, knn=0.25)]
    assert not trainer.called


def test_run_grid__minutes_of_all_attempts(grid, trainer, tmp_path, monkeypatch):
    clock = iter([0, 600, 1000, 1060])
    monkeypatch.setattr(ablation.time, 'monotonic', lambda: next(clock))
    trainer.broken = ['a']
    run_grid(grid('dict(a=dict())'), tmp_path)
    trainer.broken = []
    row, = run_grid(grid('dict(a=dict())'), tmp_path)
    assert row['minutes'] == 11


def test_run_grid__minutes_unknown_after_a_sudden_end(grid, trainer, tmp_path):
    (tmp_path / 'a/seed-0').mkdir(parents=True)
    (tmp_path / 'a/seed-0/train.log').write_text('cut')
    assert run_grid(grid('dict(a=dict())'), tmp_path) == [dict(cell='a', seed=0, knn=0.5)]


def test_run_grid__minutes_unknown_where_they_were_being_written(grid, trainer, tmp_path):
    (tmp_path / 'a/seed-0').mkdir(parents=True)
    (tmp_path / 'a/seed-0/minutes').write_text('')
    assert run_grid(grid('dict(a=dict())'), tmp_path) == [dict(cell='a', seed=0, knn=0.5)]


def test_run_grid__resumes_from_a_checkpoint_only(grid, trainer, tmp_path):
    # Without one, --resume would drop the recipe's load_from.
    run_grid(grid('dict(a=dict(), b=dict(model=dict(hooks=None)))'), tmp_path)
    assert '--resume' not in trainer.called[0]
    (tmp_path / 'a/seed-0/metrics.json').unlink()
    trainer.called.clear()
    run_grid(grid('dict(a=dict(), b=dict(model=dict(hooks=None)))'), tmp_path)
    assert trainer.called[0][-1] == '--resume'


def test_run_grid__folder_in_use(grid, trainer, tmp_path):
    with FileLock(tmp_path / '.lock'), pytest.raises(ValueError, match='another process runs a grid in'):
        run_grid(grid('dict(a=dict())'), tmp_path)
    assert not trainer.called


def test_run_grid__runs_at_a_time_have_shares_and_keep_their_order(grid, trainer, tmp_path, monkeypatch):
    # Each of the first two waits for the other's start, each of the last two likewise.
    meeting = Barrier(2, timeout=60)
    call = trainer.__call__

    def together(command, log, share, stop):
        if log.name == 'train.log':
            meeting.wait()
        call(command, log, share, stop)
    monkeypatch.setattr(ablation, '_call', together)
    monkeypatch.setattr(ablation.os, 'cpu_count', lambda: 6)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    cells = 'dict(a=dict(), b=dict(model=dict(hooks=None)), c=dict(model=dict(hooks=1)), d=dict(model=dict(hooks=2)))'
    rows = run_grid(grid(cells), tmp_path / 'out', jobs=2)
    assert [row['cell'] for row in rows] == ['a', 'b', 'c', 'd']
    assert trainer.shares == [dict(OMP_NUM_THREADS='3')] * 8


def test_shares__gpus_and_ports_of_their_own(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1,3,4,6')
    monkeypatch.setenv('PORT', '100')
    assert ablation._shares(gpus=2, jobs=2) == [
        dict(CUDA_VISIBLE_DEVICES='1,3', PORT='100'), dict(CUDA_VISIBLE_DEVICES='4,6', PORT='101')]
    assert ablation._shares(gpus=2, jobs=1) == [{}]
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    assert ablation._shares(gpus=0, jobs=2) == [dict(OMP_NUM_THREADS='5')] * 2
    with pytest.raises(ValueError, match='3 runs at a time on 2 GPUs each need 6 GPUs, 4 are visible'):
        ablation._shares(gpus=2, jobs=3)


def test_call__python_of_this_process_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    ablation._call(['bash', '-c', 'command -v python'], tmp_path / 'log', {}, Event())
    assert (tmp_path / 'log').read_text().strip() == str(Path(sys.executable).parent / 'python')


def test_call__error_of_this_attempt_and_what_is_missing(tmp_path):
    log = tmp_path / 'log'
    log.write_text('OldError: of the attempt before\n')
    with pytest.raises(RuntimeError, match='its log is .*log and ends with\na\nb$'):
        ablation._call(['bash', '-c', 'echo a; echo b; exit 3'], log, {}, Event())
    with pytest.raises(RuntimeError, match=r"ends with\nFileNotFoundError: .*'mae\.pth'\nThe head of the grid"):
        ablation._call([sys.executable, '-c', "open('mae.pth')"], log, {}, Event())


def test_run_grid__incomplete_grid(tmp_path):
    (tmp_path / 'grid.py').write_text("config = 'x.py'\n")
    with pytest.raises(ValueError, match=r"grid\.py lacks \['cells', 'seeds'\]: a grid names its config, seeds and"):
        run_grid(tmp_path / 'grid.py', tmp_path / 'out')


def test_run_grid__recipe_without_a_metric(tmp_path):
    (tmp_path / 'recipe.py').write_text("model = dict(type='X')\n")
    (tmp_path / 'grid.py').write_text(f"config = '{tmp_path}/recipe.py'\nseeds = [0]\ncells = dict(a=dict())\n")
    with pytest.raises(ValueError, match=r'recipe\.py has no test_evaluator to compare runs by'):
        run_grid(tmp_path / 'grid.py', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
