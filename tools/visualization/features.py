"""Draws the feature maps of a backbone: features.py CONFIG IMAGE --out PNG [--checkpoint FILE] [--size H W].

The module mmvitzoo.analysis.features describes the method.
"""

from mmvitzoo.analysis import draw_features, feature_maps, normalize
from mmvitzoo.analysis.command import picture_parser, read_resized, write_picture


def draw(args, model):
    image = read_resized(args.image, args.size)
    return draw_features(image, feature_maps(model, normalize(image, model.cfg.model.data_preprocessor)))


def main():
    parser = picture_parser(__doc__)
    parser.add_argument('image', help='image file')
    write_picture(parser, draw)


if __name__ == '__main__':
    main()
