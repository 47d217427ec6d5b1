import re

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from PIL import Image
from torch.utils.data import DataLoader

from mmhdistill.datasets import ImageFolder
from tests.helpers import log_messages, write_images

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='PackInputs', meta_keys=('img_path', 'split'))]
NESTED = ['a/1.png', 'a/2.png', 'a/deep/3.png', 'b/4.png', 'b/5.png']


def names(dataset):
    return [dataset.get_data_info(index)['img_path'].rsplit('/', 1)[-1] for index in range(len(dataset))]


def flat(folder, number=6, corrupt=()):
    """Images 00.png, 01.png, ... of which some hold no image, and the data set of them."""
    paths = write_images(folder, [f'{index:02}.png' for index in range(number)])
    for index in corrupt:
        paths[index].write_bytes(paths[index].read_bytes()[:60])
    return paths, ImageFolder(str(folder), pipeline=PIPELINE)


def reported(message):
    """Number of images that a warning says cannot be decoded."""
    return int(re.search(r'images that cannot be decoded,? so far: (\d+),', message)[1])


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
    assert message.startswith(f"no image found {where}'{folder}/': expected files ending in .bmp, .jpeg, .jpg, ")
    assert message.endswith('Set data_root to the folder that holds them.')


def test_init__labelled_folder_without_sub_folders(tmp_path):
    flat(tmp_path)
    with pytest.raises(FileNotFoundError, match='no image found in sub-folders'):
        ImageFolder(str(tmp_path), with_label=True)


def test_prepare_data__corrupt_image_is_replaced_by_the_next_good_one(tmp_path):
    paths, dataset = flat(tmp_path, corrupt=[1, 2])
    with log_messages() as messages:
        found = dataset[1]
    assert torch.equal(found['inputs'], pixels(paths[3]))
    assert found['data_samples'].img_path == str(paths[3])
    message, = messages
    assert reported(message) == 1
    assert f'for example {paths[1]}' in message


def test_prepare_data__the_last_image_is_replaced_by_the_first(tmp_path):
    paths, dataset = flat(tmp_path, 3, corrupt=[2])
    assert torch.equal(dataset[2]['inputs'], pixels(paths[0]))


def test_prepare_data__label_is_that_of_the_image_taken(tmp_path):
    paths = write_images(tmp_path, ['a/1.png', 'b/2.png'])
    paths[0].write_bytes(b'')
    sample = ImageFolder(str(tmp_path), with_label=True, pipeline=PIPELINE)[0]['data_samples']
    assert (sample.img_path, int(sample.gt_label)) == (str(paths[1]), 1)


def test_prepare_data__every_tenfold_number_is_reported(tmp_path):
    _, dataset = flat(tmp_path, 2, corrupt=[0])
    with log_messages() as messages:
        for _ in range(120):
            assert dataset[0]['inputs'].shape == (3, 32, 32)
    assert [reported(message) for message in messages] == [1, 10, 100]


def test_prepare_data__count_is_shared_by_the_workers(tmp_path):
    paths, dataset = flat(tmp_path, 12, corrupt=[0, 2, 4, 6, 8])
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=lambda samples: samples)
    found = [sample['data_samples'].img_path for sample, in loader]
    assert found == [str(paths[index]) for index in (1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 10, 11)]
    assert int(dataset._num_skipped) == 5


@pytest.mark.parametrize('index', [3, 4, -4])
def test_prepare_data__index_out_of_range(index, tmp_path):
    # Without it a for loop over the data set never ends.
    with pytest.raises(IndexError):
        flat(tmp_path, 3)[1][index]


class Faulty(BaseTransform):

    def transform(self, results):
        raise KeyError('a fault of the pipeline')


def test_prepare_data__fault_of_the_pipeline_is_not_swallowed(tmp_path):
    write_images(tmp_path, ['1.png', '2.png'])
    dataset = ImageFolder(str(tmp_path), pipeline=[dict(type='LoadImageFromFile'), Faulty()])
    with pytest.raises(KeyError, match='a fault of the pipeline'):
        dataset[0]
    assert int(dataset._num_skipped) == 0


def test_prepare_data__all_corrupt(tmp_path):
    _, dataset = flat(tmp_path, 3, corrupt=[0, 1, 2])
    with pytest.raises(RuntimeError, match=f"images in a row of '{tmp_path}/' cannot be decoded: check the folder"):
        dataset[0]
