"""Draws the effective receptive fields of a backbone: receptive_field.py CONFIG --out PNG [--images FILE ...].

The module mmvitzoo.analysis.receptive_field describes the method.
"""

import torch

from mmvitzoo.analysis import draw_receptive_fields, normalize, receptive_fields
from mmvitzoo.analysis.command import picture_parser, read_resized, write_picture
from mmvitzoo.models.backbones.base import image_channels

NUM_RANDOM_IMAGES = 8


def draw(args, model):
    if args.images:
        preprocessor = model.cfg.model.data_preprocessor
        images = torch.cat([normalize(read_resized(path, args.size), preprocessor) for path in args.images])
    else:
        shape = (NUM_RANDOM_IMAGES, image_channels(model), *args.size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return draw_receptive_fields(receptive_fields(model, images))


def main():
    parser = picture_parser(__doc__)
    parser.add_argument(
        '--images', nargs='+', metavar='FILE', help=f'image files (default: {NUM_RANDOM_IMAGES} random images)'
    )
    parser.set_defaults(size=(224, 224))
    write_picture(parser, draw)


if __name__ == '__main__':
    main()
