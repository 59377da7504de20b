"""Converts a published checkpoint to this package's key names: official2mm.py SRC DST.

Family, layout and variant are recognised by the keys and shapes.
"""

import argparse
from collections import Counter

from mmvitzoo.checkpoints import CheckpointError, convert, load, save


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', help='checkpoint file or http(s) address')
    parser.add_argument('dst', help='file to write: .pth, or .safetensors in that format')
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    args = parser.parse_args()
    try:
        converted = convert(load(args.src))
        save(converted.state_dict, args.dst, overwrite=args.force)
    except FileExistsError as error:
        parser.exit(1, f'{error}; --force replaces it\n')
    except OSError as error:
        parser.exit(1, f'{error}\n')
    except CheckpointError as error:
        message = str(error)
        parser.exit(1, f'{message if args.src in message else f"{args.src}: {message}"}\n')
    print(f'family   {converted.family} ({converted.source} layout)')
    print(f'variant  {converted.arch}')
    print(f'tensors  {len(converted.state_dict)}')
    for reason, count in Counter(converted.dropped.values()).items():
        print(f'dropped  {count}: {reason}')
    print(f'written  {args.dst}')


if __name__ == '__main__':
    main()
