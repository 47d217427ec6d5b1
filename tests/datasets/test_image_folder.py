import os

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from PIL import Image
from torch.utils.data import DataLoader

from mmhdistill.datasets import ImageFolder
from tests.helpers import log_messages, write_images

PIPELINE = [dict(type='mmhdistill.LoadImage'), dict(type='PackInputs', meta_keys=('img_path', 'split'))]
NESTED = ['a/1.png', 'a/2.png', 'a/deep/3.png', 'b/4.png', 'b/5.png']


def names(dataset):
    return [dataset.get_data_info(index)['img_path'].rsplit('/', 1)[-1] for index in range(len(dataset))]


def flat(folder, number=6, corrupt=(), max_bad=1.0, pipeline=PIPELINE):
    """Images 00.png, 01.png, ... of which some are cut off, and the data set of them."""
    paths = write_images(folder, [f'{index:02}.png' for index in range(number)])
    for index in corrupt:
        paths[index].write_bytes(paths[index].read_bytes()[:60])
    return paths, ImageFolder(str(folder), pipeline=pipeline, max_bad=max_bad)


def pixels(path):
    """(3, H, W) in BGR, as OpenCV has them."""
    return torch.from_numpy(np.array(Image.open(path))[..., ::-1].copy()).permute(2, 0, 1)


def test_labelled__classes_are_the_sub_folders(tmp_path):
    write_images(tmp_path, NESTED)
    dataset = ImageFolder(str(tmp_path), with_label=True, pipeline=PIPELINE)
    assert names(dataset) == ['1.png', '2.png', '3.png', '4.png', '5.png']
    assert list(dataset.CLASSES) == ['a', 'b']
    assert [int(dataset[index]['data_samples'].gt_label) for index in range(5)] == [0, 0, 0, 1, 1]


def test_unlabelled__nested(tmp_path):
    write_images(tmp_path, NESTED)
    dataset = ImageFolder(str(tmp_path), pipeline=PIPELINE)
    assert names(dataset) == ['1.png', '2.png', '3.png', '4.png', '5.png']
    assert 'gt_label' not in dataset[0]['data_samples']


def test_unlabelled__flat_with_other_files_beside(tmp_path):
    paths, _ = flat(tmp_path, 3)
    (tmp_path / 'readme.txt').write_text('no image')
    dataset = ImageFolder(str(tmp_path), pipeline=PIPELINE)
    assert names(dataset) == ['00.png', '01.png', '02.png']
    for index, path in enumerate(paths):
        assert torch.equal(dataset[index]['inputs'], pixels(path))
        assert dataset[index]['data_samples'].img_path == str(path)


@pytest.mark.parametrize('stride, expected', [(1, '01234'), (2, '024'), (3, '03'), (10, '0')])
def test_stride__every_nth_of_the_sorted_list(stride, expected, tmp_path):
    write_images(tmp_path, [f'{index}.png' for index in reversed(range(5))])
    dataset = ImageFolder(str(tmp_path), stride=stride, pipeline=PIPELINE)
    assert names(dataset) == [f'{index}.png' for index in expected]


def test_split__is_put_into_each_sample(tmp_path):
    write_images(tmp_path, NESTED)
    for split in ('bank', 'query'):
        dataset = ImageFolder(str(tmp_path), with_label=True, split=split, pipeline=PIPELINE)
        assert [dataset[index]['data_samples'].split for index in range(5)] == [split] * 5
    assert 'split' not in ImageFolder(str(tmp_path), pipeline=PIPELINE)[0]['data_samples']


@pytest.mark.parametrize('with_label', [True, False])
@pytest.mark.parametrize('there', [True, False])
def test_init__nothing_found(there, with_label, tmp_path):
    folder = tmp_path / 'images'
    if there:
        folder.mkdir()
        (folder / 'readme.txt').write_text('no image')
    where = 'in sub-folders (one per class) of ' if with_label else 'in '
    with pytest.raises(FileNotFoundError) as caught:
        ImageFolder(str(folder), with_label=with_label)
    message = str(caught.value)
    assert message.startswith(f"no image found {where}'{folder}/': expected files ending in .bmp, .gif, .jpeg, .jpg, ")
    assert message.endswith('Set data_root to the folder that holds them.')


def test_init__labelled_folder_without_sub_folders(tmp_path):
    flat(tmp_path)
    with pytest.raises(FileNotFoundError, match='no image found in sub-folders') as caught:
        ImageFolder(str(tmp_path), with_label=True)
    assert 'with_label=False' in str(caught.value)
    assert len(ImageFolder(str(tmp_path), with_label=False)) == len(list(tmp_path.iterdir()))


def test_prepare_data__bad_image_is_replaced_by_the_same_good_one_each_time(tmp_path):
    paths, dataset = flat(tmp_path, 30, corrupt=range(5, 25))
    good = [str(path) for index, path in enumerate(paths) if not 5 <= index < 25]
    torch.manual_seed(0)
    random, taken = torch.get_rng_state(), []
    for index in range(5, 25):
        sample = dataset[index]
        taken.append(sample['data_samples'].img_path)
        assert torch.equal(sample['inputs'], pixels(taken[-1]))
    assert set(taken) <= set(good) and len(set(taken)) > 5
    again = ImageFolder(str(tmp_path), pipeline=PIPELINE, max_bad=1.0)
    assert [again[index - 30]['data_samples'].img_path for index in range(5, 25)] == taken
    assert torch.equal(torch.get_rng_state(), random)  # the training's draws are its own


def test_prepare_data__a_long_row_of_bad_images(tmp_path):
    """As of a class whose archive was damaged."""
    paths, dataset = flat(tmp_path, 100, corrupt=range(5, 95))
    taken = {dataset[index]['data_samples'].img_path for index in range(5, 95)}
    assert taken <= {str(path) for path in paths[:5] + paths[95:]}
    assert dataset.problems() == {'truncated': (90, 5)}


def test_prepare_data__label_is_that_of_the_image_taken(tmp_path):
    paths = write_images(tmp_path, ['a/1.png', 'b/2.png'])
    paths[0].write_bytes(b'')
    sample = ImageFolder(str(tmp_path), with_label=True, pipeline=PIPELINE)[0]['data_samples']
    assert (sample.img_path, int(sample.gt_label)) == (str(paths[1]), 1)


def test_prepare_data__each_class_of_problem_is_told_once(tmp_path):
    paths, dataset = flat(tmp_path, 20, corrupt=[1, 2])
    paths[3].write_bytes(b'')
    paths[4].write_bytes(b'')
    for index in (5, 6):
        Image.open(paths[index]).convert('L').save(paths[index])
    with log_messages() as messages:
        for _ in range(2):
            for index in range(20):
                assert dataset[index]['inputs'].shape == (3, 32, 32)
    skipped = [message for message in messages if 'cannot be used' in message]
    assert len(skipped) == 2 and len(messages) == 3
    # An image that was to stand in for another is found before its turn.
    for problem, detail, example in (('truncated', 'Truncated File Read', 1), ('empty', 'the file has no bytes', 3)):
        assert {f'{path} cannot be used ({problem}: {detail}); another image stands in for it, as for each that is '
                f'{problem}' for path in paths[example:example + 2]} & set(skipped)
    converted = 'images are converted (greyscale: copied to three channels), for example '
    assert {f'{converted}{path}' for path in paths[5:7]} & set(messages)
    assert dataset.problems() == {'empty': (2, 3), 'truncated': (2, 1), 'greyscale': (2, 5)}
    assert dataset.num_bad() == 4


@pytest.mark.parametrize('context', ['fork', pytest.param('spawn', marks=pytest.mark.slow)])
def test_prepare_data__marks_are_shared_by_the_workers(context, tmp_path):
    paths, dataset = flat(tmp_path, 12, corrupt=[0, 2, 4, 6, 8])
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=first, multiprocessing_context=context)
    found = [sample['data_samples'].img_path for sample in loader]
    assert [found[index] for index in (1, 3, 5, 7, 9, 10, 11)] == [str(paths[i]) for i in (1, 3, 5, 7, 9, 10, 11)]
    assert dataset.problems() == {'truncated': (5, 0)}


def first(samples):
    return samples[0]


@pytest.mark.parametrize('max_bad, allowed', [(0.0, 0), (0.05, 1), (0.1, 2), (0.11, 3), (1.0, 20)])
def test_max_bad__one_more_stops(max_bad, allowed, tmp_path):
    paths, dataset = flat(tmp_path, 20, corrupt=range(min(allowed + 1, 19)), max_bad=max_bad)
    if allowed == 20:
        for index in range(20):
            dataset[index]
        assert dataset.num_bad() == 19
        return
    with pytest.raises(RuntimeError) as caught:
        for index in range(20):
            dataset[index]
    assert dataset.num_bad() == allowed + 1
    example = paths[dataset.problems()['truncated'][1]]
    assert str(caught.value) == (
        f"{allowed + 1} of the 20 images of '{tmp_path}/' cannot be used ({allowed + 1} truncated; for example "
        f'{example}), more than max_bad={max_bad:g} allows, {allowed}: list them all, '
        f"python -m mmhdistill.datasets.check '{tmp_path}/', and repair or remove them, or raise max_bad of the data "
        'set.')


def test_max_bad__reaches_the_user_from_a_worker(tmp_path):
    _, dataset = flat(tmp_path, 8, corrupt=[0, 1, 2], max_bad=0.2)
    with pytest.raises(RuntimeError, match=r'3 of the 8 images .* more than max_bad=0.2 allows, 2'):
        list(DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=first))


@pytest.mark.parametrize('max_bad', [-0.1, 1.5, 20])
def test_max_bad__is_a_share(max_bad, tmp_path):
    with pytest.raises(ValueError, match=rf'max_bad={max_bad}: give the share'):
        flat(tmp_path, max_bad=max_bad)


def test_merge_marks__of_another_process(tmp_path):
    paths, dataset = flat(tmp_path, 20, corrupt=[1, 2], max_bad=0.1)
    other = ImageFolder(str(tmp_path), pipeline=PIPELINE, max_bad=1.0)
    dataset[1], other[1], other[2]
    with log_messages() as messages:
        dataset.merge_marks(other.marks)
        dataset.merge_marks(other.marks)
    assert messages == []  # the class is known
    assert dataset.problems() == {'truncated': (2, 1)}
    paths[3].write_bytes(b'')
    other[3]
    with log_messages() as messages, pytest.raises(RuntimeError, match='3 of the 20 images'):
        dataset.merge_marks(other.marks)
    assert messages == [f'{paths[3]} cannot be used (empty: found by another process); another image stands in for it, '
                        'as for each that is empty']


@pytest.mark.parametrize('index', [3, 4, -4])
def test_prepare_data__index_out_of_range(index, tmp_path):
    # Without it a for loop over the data set never ends.
    with pytest.raises(IndexError):
        flat(tmp_path, 3)[1][index]


class Faulty(BaseTransform):

    def transform(self, results):
        raise KeyError('a fault of the pipeline')


@pytest.mark.parametrize('load', ['LoadImageFromFile', 'mmhdistill.LoadImage'])
def test_prepare_data__fault_of_the_pipeline_is_not_swallowed(load, tmp_path):
    write_images(tmp_path, ['1.png', '2.png'])
    dataset = ImageFolder(str(tmp_path), pipeline=[dict(type=load), Faulty()])
    with pytest.raises(KeyError, match='a fault of the pipeline'):
        dataset[0]
    assert dataset.num_bad() == 0


def test_prepare_data__another_transform_that_loads(tmp_path):
    paths, dataset = flat(tmp_path, 4, corrupt=[1], pipeline=[dict(type='LoadImageFromFile'), *PIPELINE[1:]])
    paths[2].write_bytes(b'')
    assert {dataset[index]['data_samples'].img_path for index in range(4)} == {str(paths[0]), str(paths[3])}
    assert dataset.problems() == {'empty': (1, 2), 'truncated': (1, 1)}


def test_prepare_data__all_corrupt(tmp_path):
    _, dataset = flat(tmp_path, 3, corrupt=[0, 1, 2])
    with pytest.raises(RuntimeError, match=f"100 images in a row of '{tmp_path}/' cannot be decoded: check"):
        dataset[0]


def test_listing__what_is_not_listed_is_told_once_a_class(tmp_path):
    write_images(tmp_path, NESTED)
    for name in ('x', 'y'):
        (tmp_path / 'a' / name).symlink_to(tmp_path)
    (tmp_path / 'b/0.png').symlink_to(tmp_path / 'missing.png')
    for with_label in (True, False):
        with log_messages() as messages:
            dataset = ImageFolder(str(tmp_path), with_label=with_label, pipeline=PIPELINE)
        assert names(dataset) == ['1.png', '2.png', '3.png', '4.png', '5.png']
        assert messages == [
            f'not listed, symlink loop: 2 paths, for example {tmp_path}/a/x (it links to {tmp_path})',
            f"not listed, unreadable: 1 paths, for example {tmp_path}/b/0.png ([Errno 2] No such file or directory: "
            f"'{tmp_path}/b/0.png')"]


def test_listing__class_without_an_image_keeps_its_label(tmp_path):
    write_images(tmp_path, ['a/1.png', 'c/2.png'])
    (tmp_path / 'b').mkdir()
    with log_messages() as messages:
        dataset = ImageFolder(str(tmp_path), with_label=True, pipeline=PIPELINE)
    assert messages == ['classes without an image: b']
    assert dataset.CLASSES == ('a', 'b', 'c') and [int(dataset[i]['data_samples'].gt_label) for i in (0, 1)] == [0, 2]


def test_listing__names_given_for_other_folders(tmp_path):
    write_images(tmp_path, NESTED)
    with pytest.raises(ValueError, match=r"has 2 sub-folders, and metainfo names 3 classes: give one name for each"):
        ImageFolder(str(tmp_path), with_label=True, metainfo=dict(classes=['x', 'y', 'z']))


def test_names__that_are_not_utf8_are_read_and_told(tmp_path):
    paths, _ = flat(tmp_path, 2)
    for path, name in zip(paths, (b'\xe9.png', b'\xea.png')):
        os.rename(path, os.path.join(os.fsencode(tmp_path), name))
    dataset = ImageFolder(str(tmp_path), pipeline=PIPELINE, max_bad=0.5)
    assert dataset[0]['inputs'].shape == (3, 32, 32)
    with open(os.path.join(os.fsencode(tmp_path), b'\xe9.png'), 'wb'), log_messages() as messages:
        dataset[0]
    assert messages[0].startswith(rf'{tmp_path}/\xe9.png cannot be used (empty: ')
