"""What a model sees in images: infer.py CONFIG CHECKPOINT IMAGE_OR_FOLDER --out DIR.

CONFIG is a file or a name of `mmvitzoo.list_models()`, of any of the three toolboxes; CHECKPOINT is of a training,
or the authors' file of a whole model. For every image, DIR gets the picture with what was found drawn on it in
`pictures/` and the numbers as JSON in `predictions/`, where a segmentor also leaves the class of each pixel as PNG.
"""

import argparse
import json
import sys
from pathlib import Path

from mmengine.utils import track_iter_progress
from PIL import Image

from mmvitzoo.inference import Predictor, find_images
from mmvitzoo.writing import whole_file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('images', help='an image, or a folder whose images are taken, also those in folders below')
    parser.add_argument('--out', type=Path, required=True, help='folder to write to; replaces files of these names')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out detections below this score')
    parser.add_argument('--device', help='of torch, such as cpu or cuda:1; default: the GPU if there is one')
    args = parser.parse_args()
    try:
        images = find_images(args.images)
        predictor = Predictor(args.config, args.checkpoint, args.device, args.score_thr)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(1, f'{error}\n')
    root = Path(args.images) if Path(args.images).is_dir() else images[0].parent
    failed = 0
    for path in track_iter_progress(images, file=sys.stderr):
        try:
            prediction = predictor(path)
        except ValueError as error:  # one bad file does not end a long run
            print(f'\n{error}', file=sys.stderr)
            failed += 1
            continue
        name = path.relative_to(root)
        picture, numbers = (args.out / folder / name for folder in ('pictures', 'predictions'))
        height, width = prediction.picture.shape[:2]
        content = dict(image=str(path), height=height, width=width, **prediction.result)
        with whole_file(f'{picture}.png') as part:
            Image.fromarray(prediction.picture).save(part, 'PNG')
        with whole_file(f'{numbers}.json') as part:
            part.write_text(json.dumps(content, indent=1))
        if prediction.labels is not None:
            with whole_file(f'{numbers}.png') as part:
                Image.fromarray(prediction.labels).save(part, 'PNG')
    print(f'\n{args.out}: {len(images) - failed} of {len(images)} images')
    parser.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
