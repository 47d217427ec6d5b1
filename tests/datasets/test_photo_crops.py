import numpy as np
import pytest
from PIL import Image

from mmhdistill.datasets import photo_crops
from mmhdistill.datasets.photo_crops import find_photographs, write_photo_crops


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """Two photographs, black on the left 70 % and white on the right 30 %."""
    found = {}
    for name in ('one', 'two'):
        pixels = np.zeros((80, 200), dtype=np.uint8)
        pixels[:, 140:] = 255
        found[name] = tmp_path / f'{name}.png'
        Image.fromarray(pixels).save(found[name])
    monkeypatch.setattr(photo_crops, 'find_photographs', lambda: found)


def crops_of(folder):
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob('*.png'))}


def test_find_photographs__all_18_arrive_with_the_packages():
    found = find_photographs()
    assert len(found) == 18
    # Room for a 32-pixel crop at scale 3 in either part.
    for path in found.values():
        width, height = Image.open(path).size
        assert height >= 96 and width - int(0.7 * width) >= 96, path


def test_find_photographs__one_is_missing(monkeypatch):
    monkeypatch.setitem(photo_crops.PHOTOGRAPHS, 'skimage/data', ('no_such_photo.png',))
    with pytest.raises(FileNotFoundError, match=r'no_such_photo.png is not in this version of skimage'):
        find_photographs()


def test_write_photo_crops__sides_never_mix(photographs, tmp_path):
    write_photo_crops(tmp_path / 'data', num_train=40, num_test=20, size=8)
    for part, brightness in (('train', 0), ('test', 255)):
        crops = crops_of(tmp_path / 'data' / part)
        assert len(crops) == dict(train=40, test=20)[part]
        assert {name.split('/')[0] for name in crops} == {'one', 'two'}
        for crop in crops.values():
            assert crop.shape == (8, 8)
            # One value: no column of the other side; the jitter moves it by at most 55.
            assert crop.min() == crop.max() and abs(int(crop[0, 0]) - brightness) <= 55


def test_write_photo_crops__the_same_seed_gives_the_same_crops(photographs, tmp_path):
    folders = [write_photo_crops(tmp_path / str(i), 20, 10, 8, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, second, other = (crops_of(folder) for folder in folders)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_write_photo_crops__a_finished_folder_is_left_alone(photographs, tmp_path):
    folder = write_photo_crops(tmp_path / 'data', 20, 10, 8)
    marked = folder / 'train/one/0000.png'
    marked.write_bytes(b'mine')
    write_photo_crops(folder, 20, 10, 8)
    assert marked.read_bytes() == b'mine'
    # An interrupted or different one is written anew.
    write_photo_crops(folder, 20, 10, 8, seed=1)
    assert Image.open(marked).size == (8, 8)
