"""Predicts for images and videos and saves the results: infer.py CONFIG CHECKPOINT INPUT --out DIR.

CONFIG is a path or a name from `mmvitzoo.list_models()`, for any of the three toolboxes. CHECKPOINT was written by a
training, or is the authors' checkpoint of a whole model. INPUT is an image, a folder of images, a video or the number
of a camera.

For each image, the tool writes the drawn prediction to `DIR/pictures/` and the prediction as JSON to
`DIR/predictions/`. Segmentors also write the class map as PNG to `DIR/predictions/`. For a video, it writes a video to
`DIR/pictures/` and a file with one line of JSON for each frame to `DIR/predictions/`. A camera is read until Ctrl-C.
"""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import cv2
from mmengine.utils import ProgressBar, track_iter_progress
from PIL import Image

from mmvitzoo.images import find_images, read_image
from mmvitzoo.inference import Predictor

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')
DEFAULT_FPS = 25  # of cameras that do not tell it


def describe(path, prediction):
    """Returns the content of a JSON file."""
    height, width = prediction.size
    return dict(image=str(path), height=height, width=width, **prediction.result)


def infer_images(args, predictor, images):
    """Predicts for images; returns the number of those that cannot be read."""
    root = Path(args.input) if Path(args.input).is_dir() else images[0].parent
    failed = 0
    for path in track_iter_progress(images, file=sys.stderr):
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:  # continue a long run after an unreadable file
            print(f'\n{error}', file=sys.stderr)
            failed += 1
            continue
        prediction = predictor(image, args.batch_size, args.tiles, args.tile_overlap)
        name = path.relative_to(root)
        picture, predictions = (args.out / folder / name for folder in ('pictures', 'predictions'))
        for file in (picture, predictions):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(prediction.picture).save(f'{picture}.png')
        Path(f'{predictions}.json').write_text(json.dumps(describe(path, prediction), indent=1))
        if prediction.labels is not None:
            Image.fromarray(prediction.labels).save(f'{predictions}.png')
    print(f'\n{args.out}: {len(images) - failed} of {len(images)} images')
    return failed


def infer_video(args, predictor, video):
    """Predicts for the frames of an open video or camera until its end or Ctrl-C; returns 1 if there is no frame."""
    is_camera = args.input.isdigit()
    name = f'camera{args.input}' if is_camera else Path(args.input).name
    fps = round(video.get(cv2.CAP_PROP_FPS), 2) or DEFAULT_FPS  # MP4 holds no more digits of a high rate
    progress = ProgressBar(max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0), file=sys.stderr)
    picture, predictions = args.out / 'pictures' / f'{name}.mp4', args.out / 'predictions' / f'{name}.jsonl'
    for file in (picture, predictions):
        file.parent.mkdir(parents=True, exist_ok=True)
    frames, writer, start = 0, None, time.monotonic()
    with predictions.open('w') as lines, suppress(KeyboardInterrupt):
        try:
            while True:
                is_read, frame = video.read()
                if not is_read:
                    break
                seconds = time.monotonic() - start if is_camera else frames / fps
                prediction = predictor(frame[..., ::-1], args.batch_size, args.tiles, args.tile_overlap)
                if writer is None:
                    size = prediction.picture.shape[1::-1]
                    writer = cv2.VideoWriter(str(picture), cv2.VideoWriter_fourcc(*'mp4v'), fps, size)
                    if not writer.isOpened():
                        raise OSError(f'{picture}: OpenCV cannot write a video of {size} pixels at {fps} Hz')
                writer.write(prediction.picture[..., ::-1])
                content = dict(frame=frames, seconds=seconds, **describe(args.input, prediction))
                lines.write(json.dumps(content) + '\n')
                frames += 1
                progress.update()
        finally:
            if writer is not None:
                writer.release()  # writes the index, without which players refuse the file
    if not frames:
        predictions.unlink()
    print(f'\n{args.out}: {frames} frames')
    return int(not frames)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='path of a config or name from mmvitzoo.list_models()')
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    parser.add_argument(
        'input', help='image, folder that is searched recursively for images, video, or number of a camera'
    )
    parser.add_argument('--out', type=Path, required=True, help='output folder; existing files are replaced')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='score threshold of detections (default: %(default)s)'
    )
    parser.add_argument(
        '--tiles',
        type=int,
        metavar='SIDE',
        help='let a detector search overlapping tiles of this side in pixels, for large images; requires sahi',
    )
    parser.add_argument(
        '--tile-overlap', type=float, default=0.2, help='overlap of tiles, share of their side (default: %(default)s)'
    )
    parser.add_argument('--batch-size', type=int, default=1, help='tiles in a batch (default: %(default)s)')
    parser.add_argument('--device', help='torch device, such as cpu or cuda:1 (default: the GPU if there is one)')
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'--out is a folder, got the file {args.out}')
    if args.batch_size < 1:
        parser.error(f'--batch-size is at least 1, got {args.batch_size}')
    video = images = None
    try:
        is_camera = args.input.isdigit() and not Path(args.input).exists()
        if is_camera or Path(args.input).suffix.lower() in VIDEO_SUFFIXES:
            video = cv2.VideoCapture(int(args.input) if is_camera else args.input)
            if not video.isOpened():
                kind = 'camera' if is_camera else 'video'
                raise ValueError(f'{args.input}: no such {kind}, or OpenCV cannot read it')
        else:
            images = find_images(args.input)
            if Path(args.input).is_dir():  # it may contain the pictures of an earlier run
                images = [path for path in images if args.out.resolve() not in path.resolve().parents]
            if not images:
                raise ValueError(f'{args.input}: no image outside {args.out}')
        predictor = Predictor(args.config, args.checkpoint, args.device, args.score_thr)
        if args.tiles is not None:
            predictor.check_tiles(args.tiles, args.tile_overlap)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.exit(1, f'{error}\n')
    try:
        failed = infer_images(args, predictor, images) if video is None else infer_video(args, predictor, video)
    except OSError as error:  # the output cannot be written
        parser.exit(1, f'\n{error}\n')
    parser.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
