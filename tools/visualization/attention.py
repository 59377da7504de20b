"""Draws what a point of an image attends to: attention.py CONFIG IMAGE --point X Y --out PNG [--checkpoint FILE].

How is said in mmvitzoo/analysis/attention.py.
"""

from mmvitzoo.analysis import attention_maps, draw_attention, normalize
from mmvitzoo.analysis.command import picture_parser, read_resized, write_picture


def draw(args, model):
    image = read_resized(args.image, args.size)
    x = normalize(image, model.cfg.model.data_preprocessor)
    return draw_attention(image, attention_maps(model, x, args.point, args.blocks), args.point, args.head)


def main():
    parser = picture_parser(__doc__)
    parser.add_argument('image')
    parser.add_argument('--point', nargs=2, type=int, metavar=('X', 'Y'), required=True, help='in pixels, after --size')
    parser.add_argument('--blocks', nargs='+', type=int, help='numbers, from 0 on; default: some of every depth')
    parser.add_argument('--head', type=int, help='number, from 0 on; default: the mean of all')
    write_picture(parser, draw)


if __name__ == '__main__':
    main()
