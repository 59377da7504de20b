"""Common parts of the commands in ``tools/visualization``."""

import argparse
from pathlib import Path
from typing import Callable, Optional, Sequence, Union

import mmcv
import numpy as np
from matplotlib.figure import Figure
from torch import nn

from ..engine import read_config
from ..images import read_image
from ..inference import load_model

MIN_SIZE = 32  # pixels

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.svg', '.pdf')


def picture_parser(description: str) -> argparse.ArgumentParser:
    """Creates a parser with the common arguments CONFIG, --out, --checkpoint and --size.

    Args:
        description: Docstring of the tool; ``--help`` shows its first line.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument('config', help='path of a config, or a name of mmvitzoo.list_models()')
    parser.add_argument('--out', type=Path, required=True, help=f'image file to write: {", ".join(SUFFIXES)}')
    parser.add_argument('--checkpoint', help="checkpoint of a training or the authors' file (default: random weights)")
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='size to resize images to (default: their own size)'
    )
    return parser


def write_picture(parser: argparse.ArgumentParser, draw: Callable[[argparse.Namespace, nn.Module], Figure]) -> None:
    """Parses the command line, builds the config's model, and draws and writes the picture.

    Args:
        parser: Result of :func:`picture_parser`.
        draw: Function of the arguments and the model, whose config is ``model.cfg``; it returns the picture.

    Raises:
        SystemExit: No picture was written; the message says why in one line.
    """
    args = parser.parse_args()
    if args.out.suffix.lower() not in SUFFIXES:
        parser.error(f'--out: file names end in {", ".join(SUFFIXES)}, got {args.out}')
    if args.size and min(args.size) < MIN_SIZE:
        parser.error(f'--size: images have at least {MIN_SIZE} pixels a side, got {args.size}')
    try:
        model = load_model(read_config(args.config), args.checkpoint)
        if args.checkpoint is None:
            print('no checkpoint: the weights are random')
        figure = draw(args, model)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, format=args.out.suffix[1:].lower())
    # Their messages say in one line what is wrong with the arguments.
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f'{error}\n')
    print(f'written  {args.out}')


def read_resized(path: Union[str, Path], size: Optional[Sequence[int]]) -> np.ndarray:
    """Reads an image and resizes it.

    Args:
        path: Path of the file.
        size: (H, W) in pixels; None keeps the size of the image.

    Returns:
        (H, W, 3) of uint8 in RGB.

    Raises:
        ValueError: The file does not exist or is not an image.
    """
    image = read_image(path)
    return image if size is None else mmcv.imresize(image, (size[1], size[0]))
