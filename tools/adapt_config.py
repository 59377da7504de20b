"""Adapts a detector's config to your own images: adapt_config.py CONFIG FOLDER --out my_config.py.

The folder holds training and validation images with boxes, and masks if the config learns them, in COCO's
format. mmvitzoo.datasets.read_coco_folder says how it may be laid out. The new config inherits from CONFIG,
a file or a name of the model zoo, and tools/train.py and MMDetection take it as any other.
"""

import argparse

from mmvitzoo.datasets import adapt_config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('folder', help='your images and annotations')
    parser.add_argument('--out', required=True, help='config to write')
    parser.add_argument('--checkpoint', help='start from this backbone or detector; default: as the config does')
    parser.add_argument('--epochs', type=int, help="length of the training; default: the config's")
    parser.add_argument('--batch-size', type=int, help="images in a step of one process; default: the config's")
    parser.add_argument('--overwrite', action='store_true', help='replace the file if there is one')
    args = parser.parse_args()
    try:
        lines = adapt_config(**vars(args))
    except FileExistsError as error:
        parser.exit(1, f'{error}; --overwrite replaces it\n')
    except (OSError, ValueError) as error:
        parser.exit(1, f'{error}\n')
    print(*lines, f'written   {args.out}', sep='\n')


if __name__ == '__main__':
    main()
