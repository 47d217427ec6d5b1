"""The quick start's data: crops of photographs that arrive inside scikit-image and scikit-learn."""
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    'skimage/data': ('astronaut.png', 'brick.png', 'camera.png', 'cell.png', 'chelsea.png', 'coffee.png', 'coins.png',
                     'grass.png', 'gravel.png', 'hubble_deep_field.jpg', 'ihc.png', 'moon.png', 'motorcycle_left.png',
                     'page.png', 'retina.jpg', 'rocket.jpg'),
    'sklearn/datasets/images': ('china.jpg', 'flower.jpg'),
}
TRAIN_SHARE = 0.7


def find_photographs() -> dict[str, Path]:
    """Class name -> file of the 18 photographs."""
    import skimage
    import sklearn
    roots = {'skimage': Path(skimage.__file__).parent, 'sklearn': Path(sklearn.__file__).parent}
    found = {}
    for folder, names in PHOTOGRAPHS.items():
        package, _, inner = folder.partition('/')
        for name in names:
            path = roots[package] / inner / name
            if not path.is_file():
                raise FileNotFoundError(f'{path} is not in this version of {package}: install the version range of '
                                        'requirements/quickstart.txt.')
            found[path.stem] = path
    return found


def write_photo_crops(root: str | Path, num_train: int = 6048, num_test: int = 1512, size: int = 32,
                      scales: tuple[int, ...] = (1, 2, 3), seed: int = 0) -> Path:
    """Write ``root/{train,test}/CLASS/*.png``: grey crops of ``size`` px; the class is the photograph.

    Training crops come from the left 70 % of each photograph, test crops from the unseen right 30 %, each at one of
    three scales, flipped at random, with brightness and contrast jitter. Written once: a finished folder is left as it
    is.
    """
    root = Path(root)
    finished = root / 'finished.txt'
    recipe = f'{num_train} {num_test} {size} {scales} {seed}\n'
    if finished.exists() and finished.read_text() == recipe:
        return root
    rng = np.random.default_rng(seed)
    photographs = find_photographs()
    for name, path in sorted(photographs.items()):
        photo = Image.open(path).convert('L')
        split = int(photo.width * TRAIN_SHARE)
        parts = {'train': ((0, split), num_train), 'test': ((split, photo.width), num_test)}
        for folder, (columns, total) in parts.items():
            target = root / folder / name
            target.mkdir(parents=True, exist_ok=True)
            for index in range(total // len(photographs)):
                _crop(photo, columns, size, int(rng.choice(scales)), rng).save(target / f'{index:04d}.png')
    finished.write_text(recipe)
    return root


def _crop(photo: Image.Image, columns: tuple[int, int], size: int, scale: int, rng: np.random.Generator) -> Image.Image:
    side = size * scale
    left = rng.integers(columns[0], columns[1] - side + 1)
    top = rng.integers(0, photo.height - side + 1)
    crop = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    contrast, brightness = rng.uniform(0.5, 1.5), rng.uniform(-55, 55)
    pixels = (pixels - pixels.mean()) * contrast + pixels.mean() + brightness
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
