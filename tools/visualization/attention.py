"""Draws the attention weights of an image point: attention.py CONFIG IMAGE --point X Y --out PNG [--checkpoint FILE].

The module mmvitzoo.analysis.attention describes the method.
"""

from mmvitzoo.analysis import attention_maps, draw_attention, normalize
from mmvitzoo.analysis.command import picture_parser, read_resized, write_picture


def draw(args, model):
    image = read_resized(args.image, args.size)
    x = normalize(image, model.cfg.model.data_preprocessor)
    return draw_attention(image, attention_maps(model, x, args.point, args.blocks), args.point, args.head)


def main():
    parser = picture_parser(__doc__)
    parser.add_argument('image', help='image file')
    parser.add_argument(
        '--point', nargs=2, type=int, metavar=('X', 'Y'), required=True, help='query point in pixels, after resizing'
    )
    parser.add_argument('--blocks', nargs='+', type=int, help='block indices (default: blocks spread over the depth)')
    parser.add_argument('--head', type=int, help='index of the head (default: mean over all heads)')
    write_picture(parser, draw)


if __name__ == '__main__':
    main()
