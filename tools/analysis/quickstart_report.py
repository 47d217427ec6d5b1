"""Print and draw what the quick start's models have learnt: METHOD.md, .json and .png in its folder."""
import argparse
import json
import sys
from pathlib import Path

from mmengine.logging import MMLogger

from mmhdistill.analysis.quickstart import report
from mmhdistill.analysis.studies import STUDIES

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='the folder that tools/quickstart.sh wrote')
    parser.add_argument('method', nargs='?', choices=STUDIES, default='hybrid', help='what it was asked to train')
    parser.add_argument('--check', action='store_true',
                        help='only look at METHOD.json, and fail if a claim does not hold')
    args = parser.parse_args()
    needed = [f'{args.method}.json'] if args.check else [
        f'{name}/last_checkpoint' for name in (*STUDIES[args.method].teachers, *STUDIES[args.method].students)]
    if missing := [name for name in needed if not (args.folder / name).exists()]:
        sys.exit(f'{args.folder} has no {", ".join(missing)}: run bash tools/quickstart.sh {args.method} first.')
    if not args.check:
        MMLogger.get_instance('report', log_level='WARNING')  # the table, not how weights were initialised
        report(args.folder, args.method)
    else:
        claims = STUDIES[args.method].claims(json.loads((args.folder / f'{args.method}.json').read_text()))
        failed = [claim for claim, holds in claims.items() if not holds]
        sys.exit('does not hold: ' + '; '.join(failed) if failed else 0)
