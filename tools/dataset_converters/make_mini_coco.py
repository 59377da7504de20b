"""Writes the demonstration data set: make_mini_coco.py [FOLDER]."""

import argparse
import time

from mmvitzoo.datasets import build_mini_coco


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', nargs='?', default='data/mini', help='folder to make (data/mini)')
    args = parser.parse_args()
    started = time.time()
    try:
        counts = build_mini_coco(args.out_dir)
    except OSError as error:
        message = str(error)
        parser.exit(1, f'{message if args.out_dir in message else f"{args.out_dir}: {message}"}\n')
    digits = ', '.join(f'{count} digits to {split}' for split, count in counts.items())
    print(f'{args.out_dir}: {digits}, in {time.time() - started:.0f} s')


if __name__ == '__main__':
    main()
