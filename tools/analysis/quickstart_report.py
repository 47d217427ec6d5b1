"""Print and draw what the quick start's models have learnt: table.md, results.json and figure.png in its folder."""
import argparse

from mmhdistill.analysis.quickstart import report

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='the folder that tools/quickstart.sh wrote')
    report(parser.parse_args().folder)
