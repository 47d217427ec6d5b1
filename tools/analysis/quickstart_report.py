"""Print and draw what the quick start's models have learnt: table.md, results.json and figure.png in its folder."""
import argparse
import json
import sys
from pathlib import Path

from mmengine.logging import MMLogger

from mmhdistill.analysis.quickstart import report, verdicts

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='the folder that tools/quickstart.sh wrote')
    parser.add_argument('--check', action='store_true',
                        help='only look at results.json, and fail if a claim does not hold')
    args = parser.parse_args()
    if not args.check:
        MMLogger.get_instance('report', log_level='WARNING')  # the table, not how weights were initialised
        report(args.folder)
    else:
        claims = verdicts(json.loads((args.folder / 'results.json').read_text()))
        failed = [claim for claim, holds in claims.items() if not holds]
        sys.exit('does not hold: ' + '; '.join(failed) if failed else 0)
