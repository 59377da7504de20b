"""What the commands in ``tools/model_converters`` have in common."""

import argparse
from collections import Counter
from typing import Callable, Dict, Optional, Tuple

from torch import Tensor

from .conversion import Converted, convert, export
from .reading import CheckpointError, load
from .saving import save

Rename = Callable[[Dict[str, Tensor]], Tuple[Dict[str, Tensor], Converted]]


def convert_file(description: str, rename: Rename) -> None:
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


def rename_to(source: str, relative: Optional[str] = None) -> Rename:
    """What :func:`convert_file` needs to write a backbone and its linear classifier in a layout.

    Args:
        source: Name of the layout, such as ``'timm'``.
        relative: Layout of plain ViTs with relative positions, if it is another; of a model that
            has neither a classifier nor a norm after the blocks.
    """

    def rename(state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Converted]:
        converted = convert(state_dict)
        target, parts = source, ('backbone.', 'head.fc.')
        if relative and converted.family == 'plainvit' and any('rel_pos' in key for key in converted.backbone):
            target, parts = relative, ('backbone.stem.', 'backbone.blocks.')
        kept = {key: value for key, value in converted.state_dict.items() if key.startswith(parts)}
        for stage in range(3):  # norms of earlier maps, which no classifier has
            for leaf in ('weight', 'bias'):
                kept.pop(f'backbone.norm{stage}.{leaf}', None)
        for key in converted.state_dict.keys() - kept.keys():
            converted.dropped[key] = f'has no place in the {target} layout'
        return export(kept, converted.family, target), converted

    return rename
