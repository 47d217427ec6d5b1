"""CIFAR-10 as the study reads it: fetched by torchvision, written as FOLDER/{train,test}/CLASS/NNNN.jpg of quality 75.

    python studies/hybrid_on_cifar10/data.py data/cifar10
"""
import argparse
from pathlib import Path


def write(dataset, folder: Path) -> None:
    """Images of each class numbered as they come; the folder has its name when all of them are there.

    Args:
        dataset: (PIL image, class) pairs with ``classes``, as torchvision's CIFAR10.
    """
    if folder.exists():
        return
    partial = folder.with_suffix('.part')
    counts = [0] * len(dataset.classes)
    for name in dataset.classes:
        (partial / name).mkdir(parents=True, exist_ok=True)
    for image, label in dataset:
        image.save(partial / dataset.classes[label] / f'{counts[label]:04}.jpg', quality=75)
        counts[label] += 1
    partial.rename(folder)


if __name__ == '__main__':
    from torchvision.datasets import CIFAR10
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='data/cifar10 for the study')
    folder = parser.parse_args().folder
    for split in ('train', 'test'):
        write(CIFAR10(folder / 'fetched', train=split == 'train', download=True), folder / split)
