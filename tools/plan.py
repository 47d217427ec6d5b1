"""What a run of a distiller will do and cost, before there are data, weights or a GPU."""
import argparse
import json
import sys
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger

import mmhdistill  # noqa: F401  (compatibility cures and config names, before the config is read)
from mmhdistill.analysis.plan import TFLOPS, plan
from mmhdistill.analysis.plan_text import as_text
from mmhdistill.compat import config_path
from mmhdistill.engine.config_guard import merge_checked


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or mmhdistill::hdistill/NAME.py')
    parser.add_argument('--gpus', type=int, metavar='N',
                        help='by default as many as make the batch that the learning rate is made for')
    parser.add_argument('--tflops', type=float, metavar='T',
                        help=f'TFLOP/s that each GPU achieves in training; {TFLOPS:g} is assumed by default')
    parser.add_argument('--images', type=int, metavar='N',
                        help='images in an epoch; by default those in the folder of the data, or as published')
    parser.add_argument('--auto-scale-lr', action='store_true', help='the run is started with --auto-scale-lr')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config, as for tools/train.py')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the facts to a new file too')
    args = parser.parse_args()
    for name, value in (('gpus', args.gpus), ('tflops', args.tflops)):
        if value is not None and value <= 0:
            parser.error(f'--{name} is {value:g}: give a number above 0')
    if args.json and args.json.exists():
        parser.error(f'{args.json} is there already: give another name')
    MMLogger.get_instance('plan', log_level='ERROR')  # what is worth a word is in the plan
    try:
        cfg = Config.fromfile(config_path(args.config))
        for doubt in merge_checked(cfg, args.cfg_options):
            print(f'{parser.prog}: {doubt}', file=sys.stderr)
        facts = plan(cfg, args.gpus, args.tflops or TFLOPS, args.images, args.auto_scale_lr)
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError, OSError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error  # which quotes it
        raise SystemExit(f'{parser.prog}: {message}') from None
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + '\n')
    print(as_text(facts, assumed=args.tflops is None))


if __name__ == '__main__':
    main()
