import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / 'benchmarks/overfit_coco.py'


@pytest.fixture(scope='module')
def benchmark():
    spec = spec_from_file_location('overfit_coco', SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_coco(folder, areas, crowd=()):
    """Images of 100 x 100 px whose objects have these areas; image i holds category i % 3."""
    annotations = [dict(id=10 * image + index, image_id=image, category_id=image % 3, area=area,
                        iscrowd=int(image in crowd))
                   for image, objects in areas.items() for index, area in enumerate(objects)]
    coco = dict(images=[dict(id=image, width=100, height=100) for image in areas], annotations=annotations,
                categories=[dict(id=index, name=name) for index, name in enumerate(('cat', 'dog', 'cow'))])
    (folder / 'annotations').mkdir()
    (folder / 'annotations/instances_train2017.json').write_text(json.dumps(coco))


def test_choose_images__fewest_large_objects_first_and_no_crowd(benchmark, tmp_path):
    areas = {image: [1000] for image in range(0, 15, 3)}
    # 21 and 24 have two objects, and the smallest of 24 is larger; 27 is the ninth.
    areas |= {18: [3000], 21: [300, 5000], 24: [400, 400], 27: [200, 5000],
              # Too small, a crowd, no object at all.
              1: [199], 2: [5000], 4: []}
    write_coco(tmp_path, areas, crowd={2})
    assert benchmark.choose_images(tmp_path, tmp_path / 'out/chosen.json') == ['cat']
    chosen = json.loads((tmp_path / 'out/chosen.json').read_text())
    assert {image['id'] for image in chosen['images']} == {0, 3, 6, 9, 12, 18, 24, 21}
    assert {o['image_id'] for o in chosen['annotations']} == {image['id'] for image in chosen['images']}
    assert [category['id'] for category in chosen['categories']] == [0]


def test_choose_images__too_few_are_told(benchmark, tmp_path):
    write_coco(tmp_path, {0: [1000], 1: [10]})
    with pytest.raises(SystemExit, match='has 1 images whose objects are all large, 8 are needed'):
        benchmark.choose_images(tmp_path, tmp_path / 'chosen.json')
