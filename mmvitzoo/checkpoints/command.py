"""What the commands in ``tools/model_converters`` have in common."""

import argparse
from collections import Counter
from typing import Callable, Dict, Tuple

from torch import Tensor

from .conversion import Converted
from .reading import CheckpointError, load
from .saving import save


def convert_file(description: str, rename: Callable[[Dict[str, Tensor]], Tuple[Dict[str, Tensor], Converted]]) -> None:
    """Reads ``SRC``, renames, writes ``DST`` whole or not at all, and says what was done.

    Args:
        description: Shown by ``--help``.
        rename: Takes the weights of the file; returns those to write and what was recognised.

    Raises:
        SystemExit: One line says why nothing was written.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('src', help='checkpoint file or http(s) address')
    parser.add_argument('dst', help='file to write: .pth, or .safetensors in that format')
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    args = parser.parse_args()
    try:
        weights, converted = rename(load(args.src))
        save(weights, args.dst, overwrite=args.force)
    except FileExistsError as error:
        parser.exit(1, f'{error}; --force replaces it\n')
    except OSError as error:
        parser.exit(1, f'{error}\n')
    except CheckpointError as error:
        message = str(error)
        parser.exit(1, f'{message if args.src in message else f"{args.src}: {message}"}\n')
    print(f'family   {converted.family} ({converted.source} layout)')
    print(f'variant  {converted.arch}')
    print(f'tensors  {len(weights)}')
    for reason, count in Counter(converted.dropped.values()).items():
        print(f'dropped  {count}: {reason}')
    print(f'written  {args.dst}')
