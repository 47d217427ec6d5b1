"""Write the quick start's data set: 32-px crops of 18 photographs."""
import argparse

from mmhdistill.datasets.photo_crops import write_photo_crops

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', help='folder to write {train,test}/CLASS/*.png into')
    write_photo_crops(parser.parse_args().root)
