"""The teachers that ship: list them, show one, or check a weight file against its card."""
import argparse

import mmhdistill  # noqa: F401  (compatibility cures, before mmcv is imported)
from mmhdistill.analysis.teachers import as_markdown, as_text, card_rows, check, show
from mmhdistill.models import find_card


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    listing = commands.add_parser('list', help='all teacher cards')
    listing.add_argument('--markdown', action='store_true', help='as the table of docs/teachers.md')
    showing = commands.add_parser('show', help='every field of a card')
    checking = commands.add_parser('check', help="load a card's file strictly and run it on a photograph")
    for command in (showing, checking):
        command.add_argument('card', help='name of a card, see list')
    checking.add_argument('--checkpoint', default='auto', metavar='FILE',
                          help='path or URL of the weight file; without it, the one that the card names is fetched')
    checking.add_argument('--image', metavar='FILE', help="photograph to run on; scikit-image's by default")
    checking.add_argument('--sha256', help='hash that the file must have, or its beginning')
    checking.add_argument('--entry', help='dict in the file to read, for example model_ema')
    checking.add_argument('--prefix', help="of the ViT's keys, for example module.momentum_encoder.")
    args = parser.parse_args()
    try:
        if args.command == 'list':
            print((as_markdown if args.markdown else as_text)(card_rows()))
        elif args.command == 'show':
            print(show(find_card(args.card)))
        else:
            print(check(find_card(args.card), args.checkpoint, args.image, sha256=args.sha256, entry=args.entry,
                        prefix=args.prefix))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise SystemExit(f'{parser.prog}: {error}') from None


if __name__ == '__main__':
    main()
