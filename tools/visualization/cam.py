"""Draws class activation maps: cam.py CONFIG IMAGE --out PNG [--checkpoint FILE] [--category NAME] [--size H W].

The module mmvitzoo.analysis.class_activation describes the method.
"""

from mmvitzoo.analysis import class_activations, draw_class_activations, normalize
from mmvitzoo.analysis.command import picture_parser, read_resized, write_picture
from mmvitzoo.inference import dataset_metainfo


def draw(args, model):
    image = read_resized(args.image, args.size)
    x = normalize(image, model.cfg.model.data_preprocessor)
    classes = dataset_metainfo(model.cfg).get('classes') or ()
    category = None
    if args.category in classes:
        category = classes.index(args.category)
    elif args.category is not None:
        if not args.category.isdigit():
            raise ValueError(f'--category is one of {", ".join(classes) or "the numbers"}, got {args.category}')
        category = int(args.category)
    index, score, maps = class_activations(model, x, category)
    name = classes[index] if index < len(classes) else str(index)
    return draw_class_activations(image, name, score, maps)


def main():
    parser = picture_parser(__doc__)
    parser.add_argument('image', help='image file')
    parser.add_argument(
        '--category', help='name of a class, or its index if there is no such name (default: predicted)'
    )
    write_picture(parser, draw)


if __name__ == '__main__':
    main()
