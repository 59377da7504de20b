"""A small instance segmentation data set made of real data that installed packages ship.

Handwritten digits (scikit-learn's copy of the UCI optical recognition set, 1797 samples) are
scaled, rotated, coloured and pasted with overlap and clutter on photographs (scikit-learn's and
scikit-image's). Train and val use different samples. Every number comes from NumPy's frozen
``RandomState`` stream, so the same packages always give the same files.

Written are, under one folder::

    annotations/instances_{train,val}.json   COCO, masks as RLE of the visible pixels
    {train,val}/*.jpg                        images, 160 or 192 pixels a side
    semantic/{train,val}/*.png               0 is background, 1 to 10 the digits 0 to 9
    classes/{train,val}/{0..9}/*.jpg         every digit cut out, for classification
"""

import glob
import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

import cv2
import numpy as np
from numpy.random import RandomState
from pycocotools import mask as rle

CLASSES = tuple('0123456789')
NUM_IMAGES = {'train': 400, 'val': 100}
NUM_TRAIN_DIGITS = 1400
WIDTHS, HEIGHTS = (160, 192), (160,)
DIGIT_SIZE = (32, 64)
MIN_VISIBLE = 0.75  # of a digit that others cover
JPEG = (cv2.IMWRITE_JPEG_QUALITY, 92)
MARK = 'mini_coco.txt'  # tells our folder from one that is not ours to replace
LONGEST_BUILD = 3600  # seconds, after which a folder of work belongs to a build that was killed


def build_mini_coco(out_dir: Union[str, Path]) -> Dict[str, int]:
    """Writes the data set, replacing an earlier one whole.

    It is built in a hidden folder beside the target. One that a killed build has left is removed by
    the first build an hour later.

    Args:
        out_dir: Folder to be made, such as ``data/mini``.

    Returns:
        Number of digits by split.

    Raises:
        FileExistsError: The folder exists and was not written by this function.
        OSError: Something cannot be written, as on a full disk; the target is what it was.
    """
    from sklearn.datasets import load_digits  # which training on other data does without

    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / MARK).exists():
        raise FileExistsError(f'{out_dir}: exists and is not a mini COCO data set; choose another folder')
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    digits, labels = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8).astype(np.float32) / 16
    order = RandomState(0).permutation(len(digits))
    photos = _photographs()
    counts = {}
    prefix = f'.{out_dir.name}.building.'
    for left in out_dir.parent.glob(f'{glob.escape(prefix)}*'):
        with suppress(FileNotFoundError):  # of a build that has just ended
            if time.time() - left.stat().st_mtime > LONGEST_BUILD:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=prefix) as work:
        new, old = Path(work, 'new'), Path(work, 'old')
        for split, samples in (('train', order[:NUM_TRAIN_DIGITS]), ('val', order[NUM_TRAIN_DIGITS:])):
            counts[split] = _write_split(new, split, digits[samples], labels[samples], photos)
        (new / MARK).write_text('Made by mmvitzoo.datasets.build_mini_coco; replaced whole when made again.\n')
        new.chmod(0o755)
        if out_dir.exists():
            out_dir.rename(old)
        try:
            new.rename(out_dir)
        except BaseException:
            if old.exists():
                old.rename(out_dir)
            raise
    return counts


def _photographs() -> List[np.ndarray]:
    """BGR photographs, each at least 192 pixels a side."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    rgb = list(load_sample_images().images)
    rgb += [load() for load in (data.astronaut, data.cat, data.coffee, data.rocket, data.retina)]
    photos = [np.ascontiguousarray(image[..., 2::-1]) for image in rgb]
    return [cv2.resize(photo, None, fx=480 / len(photo), fy=480 / len(photo)) for photo in photos]


def _write_split(root: Path, split: str, digits: np.ndarray, labels: np.ndarray, photos: List[np.ndarray]) -> int:
    for folder in (root / split, root / 'semantic' / split, root / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(NUM_IMAGES[split]):
        stream = RandomState(index + 100_000 * (split == 'val'))
        image, masks, classes = _scene(stream, digits, labels, photos)
        height, width = image.shape[:2]
        images.append(dict(id=index + 1, file_name=f'{index + 1:06d}.jpg', height=height, width=width))
        _write_image(root / split / f'{index + 1:06d}.jpg', image, JPEG)
        semantic = np.zeros((height, width), np.uint8)
        for mask, label in zip(masks, classes):
            semantic[mask] = label + 1
            encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = [int(x) for x in rle.toBbox(encoded)]
            number = len(annotations) + 1
            annotations.append(
                dict(
                    id=number,
                    image_id=index + 1,
                    category_id=int(label) + 1,
                    bbox=box,
                    area=int(mask.sum()),
                    iscrowd=0,
                    segmentation=dict(size=[height, width], counts=encoded['counts'].decode()),
                )
            )
            folder = root / 'classes' / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            x, y, w, h = box
            _write_image(folder / f'{number:06d}.jpg', image[y : y + h, x : x + w], JPEG)
        _write_image(root / 'semantic' / split / f'{index + 1:06d}.png', semantic)
    coco = dict(
        info=dict(description='Digits on photographs', version='1.0'),
        images=images,
        annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    return len(annotations)


def _write_image(path: Path, image: np.ndarray, options: Sequence[int] = ()) -> None:
    # cv2.imwrite says nothing of a full disk.
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1])


def _scene(
    stream: RandomState, digits: np.ndarray, labels: np.ndarray, photos: List[np.ndarray]
) -> Tuple[np.ndarray, List[np.ndarray], List[int]]:
    """An image, the visible masks of its digits and their labels."""
    width, height = stream.choice(WIDTHS), stream.choice(HEIGHTS)
    photo = photos[stream.randint(len(photos))]
    top, left = stream.randint(len(photo) - height + 1), stream.randint(photo.shape[1] - width + 1)
    image = photo[top : top + height, left : left + width].astype(np.float32)
    if stream.rand() < 0.5:
        image = image[:, ::-1].copy()
    _add_clutter(stream, image)
    masks: List[np.ndarray] = []
    classes: List[int] = []
    full_areas: List[int] = []
    for _ in range(stream.randint(2, 6)):
        sample = stream.randint(len(digits))
        for _ in range(20):
            cover = _place(stream, digits[sample], height, width)
            mask = cover > 0.5
            left_over = [(old & ~mask).sum() for old in masks]
            if all(now >= MIN_VISIBLE * full for now, full in zip(left_over, full_areas)):
                masks = [old & ~mask for old in masks] + [mask]
                classes.append(int(labels[sample]))
                full_areas.append(mask.sum())
                _paint(stream, image, cover)
                break
    image += stream.standard_normal(image.shape) * 4
    return image.clip(0, 255).astype(np.uint8), masks, classes


def _place(stream: RandomState, digit: np.ndarray, height: int, width: int) -> np.ndarray:
    """Coverage in [0, 1] of the whole image by one scaled, rotated, shifted digit."""
    size = stream.uniform(*DIGIT_SIZE)
    scale = np.array([size * stream.uniform(0.85, 1.15), size]) / 8
    angle = np.deg2rad(stream.uniform(-8, 8))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    margin = size / 2 + 2
    centre = [stream.uniform(margin, width - margin), stream.uniform(margin, height - margin)]
    matrix = np.column_stack([rotation, centre - rotation @ [3.5, 3.5]])
    value = cv2.warpAffine(digit, matrix, (int(width), int(height)), flags=cv2.INTER_CUBIC)
    return ((value - 0.35) / 0.3).clip(0, 1)


def _paint(stream: RandomState, image: np.ndarray, cover: np.ndarray) -> None:
    """Blends in a colour that differs from what it covers, shaded from top to bottom."""
    beneath = image[cover > 0.5].mean(0)
    colours = stream.uniform(0, 255, (4, 3))
    colour = colours[np.abs(colours - beneath).sum(1).argmax()]
    shade = np.linspace(1, stream.uniform(0.7, 1.3), len(image))[:, None, None]
    image += cover[..., None] * (colour * shade - image)


def _add_clutter(stream: RandomState, image: np.ndarray) -> None:
    """Lines and ellipses in random colours: strokes that are no digits."""
    height, width = image.shape[:2]
    for _ in range(stream.randint(1, 4)):
        colour = stream.uniform(0, 255, 3).tolist()
        start, end = ([int(stream.randint(width)), int(stream.randint(height))] for _ in range(2))
        if stream.rand() < 0.5:
            cv2.line(image, start, end, colour, int(stream.randint(1, 6)), cv2.LINE_AA)
        else:
            axes = [int(stream.randint(3, 20)), int(stream.randint(3, 20))]
            cv2.ellipse(image, start, axes, float(stream.uniform(180)), 0, 360, colour, int(stream.choice([-1, 2])))
