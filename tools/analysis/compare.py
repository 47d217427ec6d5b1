"""Compare models on a folder of images: one page of figures and numbers, report.html, and the figures as PNG."""
import argparse
from pathlib import Path

import torch

import mmhdistill  # noqa: F401  (compatibility cures and config names, before a config is read)
from mmhdistill.analysis.compare import LAYERS, QUERIES, compare, read_images
from mmhdistill.analysis.zoo import load_model


def place(text: str) -> tuple[float, float]:
    try:
        y, x = map(float, text.split(','))
    except ValueError:
        y = x = -1.0
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no place in an image: give Y,X, shares of its height and width in 0..1, as 0.5,0.5")
    return y, x


def depth(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no share of the depth: give more than 0 and at most 1, which is the last layer")
    return share


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL',
                        help='a teacher card (NAME, NAME=FILE or NAME=None for random weights), the checkpoint of a '
                        "distiller, of what was trained from it, or of mmpretrain's MAE or MoCo v3 (FILE.pth, or "
                        'CONFIG.py=FILE.pth if it keeps no config), or a config (FILE.py or mmhdistill::ROOM/NAME.py); '
                        'LABEL:MODEL names it in figures')
    parser.add_argument('--images', required=True, type=Path, help='a folder of images')
    parser.add_argument('--out', required=True, type=Path, help='a new folder for the report')
    parser.add_argument('--num-images', type=int, default=16,
                        help='taken evenly from the folder (default: %(default)s)')
    parser.add_argument('--size', type=int, help="side of the images; each model's own by default")
    parser.add_argument('--queries', nargs='+', type=place, metavar='Y,X', default=QUERIES,
                        help='places whose attention is drawn, as shares of height and width from the upper left '
                        f'corner (default: {" ".join(f"{y:g},{x:g}" for y, x in QUERIES)})')
    parser.add_argument('--layers', nargs='+', type=depth, metavar='SHARE', default=LAYERS,
                        help='layers whose attention is drawn, as shares of the depth, 1 for the last '
                        f'(default: {" ".join(f"{share:g}" for share in LAYERS)})')
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'{args.out} is a file: give --out a folder.')
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f'{args.out} holds files already: give another --out.')
    for name in ('num_images', 'size'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}: give 1 or more.')
    torch.manual_seed(0)  # Of models of random weights.
    try:
        models = [load_model(text) for text in args.models]
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            parser.error(f'two models have one name in {names}: name them, LABEL:MODEL.')
        for model in models:
            model.image_size = args.size or model.image_size
            if model.image_size % model.spec.patch_size or model.image_size < 2 * model.spec.patch_size:
                parser.error(f'images of {model.image_size} pixels cannot be cut into the patches of {model.name}: '
                             f'give --size a multiple of {model.spec.patch_size}, at least twice.')
        images, notes = read_images(args.images, args.num_images, max(model.image_size for model in models))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for note in compare(models, images, args.out, args.queries, args.layers, notes)['notes']:
        print(note)
    print(f'{args.out}/report.html')


if __name__ == '__main__':
    main()
