"""Export the student of a checkpoint: weights of another library, or a program, and a manifest of where it comes from.

The features of every export are all tokens after the final norm, the class token first.
"""
import argparse

import mmhdistill  # noqa: F401  (compatibility cures, before mmcv is imported)
from mmhdistill.export import TARGETS, export


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='of a distiller, or of a model that was trained from its student')
    parser.add_argument('--to', choices=TARGETS, required=True, help='library or runtime that reads the export')
    parser.add_argument('--config', help='config of the run; by default the one that the checkpoint keeps')
    parser.add_argument('--out', metavar='PATH',
                        help='file, or folder for huggingface; by default beside the checkpoint, named after it')
    parser.add_argument('--img-size', type=int, metavar='N',
                        help="side of the images in pixels, by default the student's; positions are resampled")
    parser.add_argument('--force', action='store_true', help='replace an earlier export')
    args = parser.parse_args()
    try:
        out, manifest = export(args.checkpoint, args.to, args.config, args.out, args.img_size, args.force)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise SystemExit(f'{parser.prog}: {error}') from None
    size = 'x'.join(map(str, manifest['image_size']))
    print(f'{out} for {args.to}, images of {size} px; {out}.json says where it comes from')
    if 'max_difference' in manifest:
        print(f"features differ from the student's by at most {manifest['max_difference']:.2g} (3 images of noise)")


if __name__ == '__main__':
    main()
