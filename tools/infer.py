"""Predicts for images and saves the results: infer.py CONFIG CHECKPOINT IMAGE_OR_FOLDER --out DIR.

CONFIG is a path or a name from `mmvitzoo.list_models()`, for any of the three toolboxes. CHECKPOINT was written by a
training, or is the authors' checkpoint of a whole model. For each image, the tool writes the drawn prediction to
`DIR/pictures/` and the prediction as JSON to `DIR/predictions/`. Segmentors also write the class map as PNG to
`DIR/predictions/`.
"""

import argparse
import json
import sys
from pathlib import Path

from mmengine.utils import track_iter_progress
from PIL import Image

from mmvitzoo.images import find_images
from mmvitzoo.inference import Predictor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='path of a config or name from mmvitzoo.list_models()')
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    parser.add_argument('images', help='image, or folder that is searched recursively for images')
    parser.add_argument('--out', type=Path, required=True, help='output folder; existing files are replaced')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='score threshold of detections (default: %(default)s)'
    )
    parser.add_argument('--device', help='torch device, such as cpu or cuda:1 (default: the GPU if there is one)')
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'--out is a folder, got the file {args.out}')
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
        except ValueError as error:  # continue a long run after an unreadable file
            print(f'\n{error}', file=sys.stderr)
            failed += 1
            continue
        name = path.relative_to(root)
        picture, predictions = (args.out / folder / name for folder in ('pictures', 'predictions'))
        height, width = prediction.picture.shape[:2]
        content = dict(image=str(path), height=height, width=width, **prediction.result)
        for file in (picture, predictions):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(prediction.picture).save(f'{picture}.png')
        Path(f'{predictions}.json').write_text(json.dumps(content, indent=1))
        if prediction.labels is not None:
            Image.fromarray(prediction.labels).save(f'{predictions}.png')
    print(f'\n{args.out}: {len(images) - failed} of {len(images)} images')
    parser.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
