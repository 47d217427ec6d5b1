"""What would keep a run from working on this machine: packages, GPUs, data, disk; and the cure of each finding.

Exit code: 0 when nothing has to be cured (there may be notes), 1 when something has, 2 for wrong arguments.
"""
import argparse
import importlib.util
import sys
import types
from pathlib import Path

# Where it is not installed, which is what the doctor may be asked about.
sys.path.append(str(Path(__file__).resolve().parents[1]))
# `import mmhdistill` imports what may be broken: of the package only what is asked for is imported here.
_PACKAGE = types.ModuleType('mmhdistill')
_PACKAGE.__path__ = list(importlib.util.find_spec('mmhdistill').submodule_search_locations)
sys.modules.setdefault('mmhdistill', _PACKAGE)
from mmhdistill.analysis.doctor import as_text, examine  # noqa: E402


def option(text: str) -> str:
    if '=' not in text:
        raise argparse.ArgumentTypeError(f"'{text}' is no KEY=VALUE")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='of the run to come: its settings, data, weights and disk')
    parser.add_argument('--work-dir', help="where the run is to write; by default as tools/train.py has it")
    parser.add_argument('--gpus', type=int, metavar='N', help='of the run; as in tools/plan.py')
    parser.add_argument('--cfg-options', nargs='+', type=option, metavar='KEY=VALUE',
                        help='override settings of the config, as for tools/train.py')
    args = parser.parse_args()
    report = examine(args.config, args.cfg_options, args.work_dir, args.gpus)
    print(as_text(report))
    raise SystemExit(1 if report.problems else 0)


if __name__ == '__main__':
    main()
