"""What the commands in ``tools/visualization`` that look into backbones have in common."""

import argparse
from pathlib import Path
from typing import Callable, Optional, Sequence, Union

import mmcv
import numpy as np
from matplotlib.figure import Figure
from torch import nn

from ..engine import read_config
from ..inference import load_model, read_image
from ..models.backbones.base import MIN_SIZE

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.svg', '.pdf')


def picture_parser(description: str) -> argparse.ArgumentParser:
    """A parser of what every such command takes: CONFIG, --out, --checkpoint and --size.

    Args:
        description: The tool's docstring, whose first line is shown by ``--help``.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument('config', help='a file, or a name of mmvitzoo.list_models()')
    parser.add_argument('--out', type=Path, required=True, help=f'the picture to write: {", ".join(SUFFIXES)}')
    parser.add_argument('--checkpoint', help="of a training, or the authors' file; default: random weights")
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), help='to which images are resized')
    return parser


def write_picture(parser: argparse.ArgumentParser, draw: Callable[[argparse.Namespace, nn.Module], Figure]) -> None:
    """Parses the command line, builds the config's model, draws, and writes the picture.

    Args:
        parser: See :func:`picture_parser`.
        draw: Takes the arguments and the model, with its config as ``cfg``; returns the picture.

    Raises:
        SystemExit: One line says why no picture was written.
    """
    args = parser.parse_args()
    if args.out.suffix.lower() not in SUFFIXES:
        parser.error(f'--out: pictures end in {", ".join(SUFFIXES)}, got {args.out}')
    if args.size and min(args.size) < MIN_SIZE:
        parser.error(f'--size: images have at least {MIN_SIZE} pixels a side, got {args.size}')
    try:
        model = load_model(read_config(args.config), args.checkpoint)
        if args.checkpoint is None:
            print('no checkpoint: the weights are random')
        figure = draw(args, model)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, format=args.out.suffix[1:].lower())
    except (ValueError, OSError) as error:  # each says in a line what is wrong with what was given
        parser.exit(1, f'{error}\n')
    print(f'written  {args.out}')


def read_resized(path: Union[str, Path], size: Optional[Sequence[int]]) -> np.ndarray:
    """Reads an image.

    Args:
        path: Its file.
        size: (H, W) to which it is resized; None leaves its own size.

    Returns:
        (H, W, 3) of uint8, in RGB.

    Raises:
        ValueError: There is no such file, or it is no image.
    """
    image = read_image(path)
    return image if size is None else mmcv.imresize(image, (size[1], size[0]))
