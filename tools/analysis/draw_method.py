"""Draw a distillation config as a picture."""
import argparse

from mmengine.config import Config

from mmhdistill.analysis.method_figure import draw

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config with a feature loss, a relation loss and input masking')
    parser.add_argument('out', help='PNG or SVG to write')
    args = parser.parse_args()
    draw(Config.fromfile(args.config), args.out)
