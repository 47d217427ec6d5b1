import os
from collections import Counter

import pytest
import torch
from mmengine.runner import Runner
from torch.utils.data import ConcatDataset

from mmhdistill.datasets import ImageFolder
from mmhdistill.datasets.image_folder import PROBLEMS
from mmhdistill.engine import DataReport
from mmhdistill.engine.hooks import data_report
from tests.datasets.image_files import bad_files, convertible, encoded, picture, write_corpus
from tests.helpers import log_messages, spawn, tiny_distiller

PIPELINE = [dict(type='mmhdistill.LoadImage'), dict(type='Resize', scale=(32, 32)), dict(type='PackInputs')]


def write_folder(folder):
    """216 bad files among good ones and ones to convert."""
    bad = bad_files()
    write_corpus(folder, bad)
    write_corpus(folder / 'nested', {f'{index}.jpg': (encoded(picture(index), 'JPEG'), '') for index in range(69)})
    write_corpus(folder / 'other', convertible())
    return bad


def runner_of(folder, work_dir, model=None, **dataset):
    return Runner(
        model=model or tiny_distiller(), work_dir=str(work_dir), experiment_name=work_dir.name,
        train_dataloader=dict(
            batch_size=20, num_workers=1, collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=dict(type='mmhdistill.ImageFolder', data_root=str(folder), pipeline=PIPELINE, **dataset)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[dict(type='mmhdistill.DataReport', interval=5)],
        default_scope='mmpretrain', randomness=dict(seed=0))


def test_training__on_a_corpus_of_bad_files_finishes_and_counts_them(tmp_path):
    bad = write_folder(tmp_path / 'images')
    assert len(bad) == 216
    runner = runner_of(tmp_path / 'images', tmp_path / 'run', max_bad=0.8)
    losses = []
    runner.model.register_forward_hook(lambda model, args, output: losses.append(sum(output.values()).item()))
    runner.train()
    assert runner.epoch == 2 and runner.iter == len(losses) == 30
    assert all(torch.isfinite(torch.tensor(losses)))

    log, = (tmp_path / 'run').glob('*/*.log')
    lines = log.read_text().splitlines()
    skipped = Counter(problem for _, problem in bad.values())
    converted = Counter(problem for _, problems in convertible().values() for problem in problems)
    order = ('empty', 'not an image', 'truncated', 'damaged', 'hostile size')
    kinds = ('greyscale', 'CMYK', 'colour mode', 'alpha', '16-bit', 'EXIF rotation', 'animated')
    total, = [line.partition(' - INFO - ')[2] for line in lines if 'could not be used' in line]
    assert total == (
        f'{tmp_path}/images/: of 300 images 216 could not be used '
        f'({", ".join(f"{skipped[problem]} {problem}" for problem in order)}); '
        f'converted: {", ".join(f"{converted[problem]} {problem}" for problem in kinds)}; '
        'paths that could not be listed: 0')
    for problem in order:
        line, = [line for line in lines if f'({problem}: ' in line]
        name = line.partition(' - WARNING - ')[2].partition(' cannot be used')[0].rpartition('/')[2]
        assert bad[name][1] == problem
    for problem in kinds:
        line, = [line for line in lines if f'images are converted ({problem}: ' in line]
        assert problem in convertible()[line.rpartition('/')[2]][1]


def test_training__stops_where_more_are_bad_than_the_limit(tmp_path):
    write_folder(tmp_path / 'images')
    runner = runner_of(tmp_path / 'images', tmp_path / 'run')
    # 5 % of 300, and one more.
    with pytest.raises(RuntimeError, match=r'16 of the 300 images .* more than max_bad=0.05 allows, 15: list them all'):
        runner.train()
    assert runner.iter == 0


def bare_runner(dataset, split='train'):
    """What the hook reads of a Runner."""
    loader = type('Loader', (), dict(dataset=dataset))
    return type('Runner', (), {f'{split}_dataloader': loader, 'iter': 4})


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_totals__of_each_folder_that_a_data_set_holds(split, tmp_path):
    folders = []
    for name in 'ab':
        write_corpus(tmp_path / name, {'0.jpg': (encoded(picture(0), 'JPEG'), ''), '1.jpg': (b'', '')})
        folders.append(ImageFolder(str(tmp_path / name), pipeline=PIPELINE))
    folders[1][1]
    with log_messages() as messages:
        getattr(DataReport(), f'after_{split}')(bare_runner(ConcatDataset(folders), split))
    assert messages == [
        f'{tmp_path}/a/: of 2 images 0 could not be used (none); converted: none; paths that could not be listed: 0',
        f'{tmp_path}/b/: of 2 images 1 could not be used (1 empty); converted: none; paths that could not be listed: 0']


def test_totals__of_other_data_sets_are_none():
    with log_messages() as messages:
        DataReport(interval=1).after_train_iter(bare_runner([1, 2]), 0)
        DataReport().after_train(bare_runner([1, 2]))
    assert messages == []


def test_marks__other_problems_of_the_same_image_elsewhere(tmp_path, monkeypatch):
    """A disk that fails shows one process an unreadable image, and another one that it converts."""
    write_corpus(tmp_path, {f'{index}.jpg': (encoded(picture(index), 'JPEG'), '') for index in range(3)})
    folders = [ImageFolder(str(tmp_path), pipeline=PIPELINE, max_bad=1) for _ in range(2)]
    folders[0].marks[1] = 1 << PROBLEMS.index('empty')
    folders[1].marks[1] = 1 << PROBLEMS.index('CMYK') | 1 << PROBLEMS.index('alpha')
    given = []
    monkeypatch.setattr(data_report, 'all_reduce', lambda x, op: given.append((x.clone(), op)))
    for folder in folders:
        DataReport(interval=1).after_train_iter(bare_runner(folder), 0)
    assert {op for _, op in given} == {'max'} and {x.dtype for x, _ in given} == {torch.uint8}
    parts = [x for x, _ in given]
    one, other = parts[:len(PROBLEMS)], parts[len(PROBLEMS):]
    for folder in folders:
        most = iter([torch.maximum(*pair) for pair in zip(one, other, strict=True)])
        monkeypatch.setattr(data_report, 'all_reduce', lambda x, op, most=most: x.copy_(next(most)))
        DataReport(interval=1).after_train_iter(bare_runner(folder), 0)
        assert folder.problems() == dict.fromkeys(('empty', 'CMYK', 'alpha'), (1, 1))


def test_init__interval():
    with pytest.raises(ValueError, match='interval=0: give at least 1 iteration'):
        DataReport(interval=0)


def read_half(rank, folder, results):
    os.environ['LOCAL_RANK'] = str(rank)
    dataset, hook = ImageFolder(str(folder), pipeline=PIPELINE, max_bad=0.6), DataReport(interval=5)
    with log_messages() as messages:
        for index in range(5 * rank, 5 * rank + 5):
            dataset[index]
        own = dataset.num_bad()
        hook.after_train_iter(bare_runner(dataset), 4)  # the fifth
        between = dataset.problems()
        hook.after_train(bare_runner(dataset))
        try:
            dataset.max_bad = 0.5
            hook.after_train(bare_runner(dataset))
            stopped = ''
        except RuntimeError as error:
            stopped = str(error)
    torch.save(dict(own=own, between=between, stopped=stopped, messages=messages), results / f'{rank}.pth')


@pytest.mark.slow
def test_marks__of_two_processes_are_put_together(tmp_path):
    """The first reads 0-4, the second 5-9; who stands in for whom is drawn, so each may meet more."""
    content = {f'{index}.jpg': (encoded(picture(index), 'JPEG'), '') for index in range(10)}
    content.update({f'{index}.jpg': (b'', '') for index in (0, 1, 2)})
    content.update({f'{index}.jpg': (b'no image', '') for index in (7, 8, 9)})
    write_corpus(tmp_path / 'images', content)
    spawn(read_half, tmp_path, tmp_path / 'images', tmp_path)
    found = [torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1)]
    assert found[0]['own'] < 6 or found[1]['own'] < 6
    for report in found:
        assert report['between'] == {'empty': (3, 0), 'not an image': (3, 7)}
        assert report['stopped'].startswith('6 of the 10 images')
    # Each class once, whoever met it.
    told = [message for message in found[0]['messages'] if 'cannot be used' in message]
    assert sorted(message.partition('as for each that is ')[2] for message in told) == ['empty', 'not an image']
    assert any('of 10 images 6 could not be used (3 empty, 3 not an image)' in x for x in found[0]['messages'])
