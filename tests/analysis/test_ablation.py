import pytest

from mmhdistill.analysis.ablation import as_markdown, metric_names, run_grid, summarise, write

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
                                 '| a | 2 | 52.00 ± 2.83 | 1.50 ± 0.71 |\n| b | 1 | 61.00 | 3.00 |\n')


def test_write__one_csv_line_per_run(tmp_path):
    write(ROWS, tmp_path)
    assert (tmp_path / 'table.csv').read_text().splitlines() == [
        'cell,seed,knn,minutes', 'a,0,50.0,1.0', 'a,1,54.0,2.0', 'b,0,61.0,3.0']
    assert (tmp_path / 'table.md').read_text() == as_markdown(ROWS)
    assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


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
