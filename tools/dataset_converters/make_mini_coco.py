"""Makes a small instance segmentation data set of real images that installed packages ship: make_mini_coco.py [FOLDER].

Handwritten digits (scikit-learn's copy of the UCI optical recognition set, 1797 samples) are scaled, rotated, colored
and pasted with overlap and clutter on photographs (scikit-learn's and scikit-image's). Train and val use different
samples. Random numbers come from NumPy's frozen ``RandomState``, so the same packages always give the same files::

    annotations/instances_{train,val}.json   COCO, masks as RLE of the visible pixels
    {train,val}/*.jpg                        images, 160 or 192 pixels a side
    semantic/{train,val}/*.png               0 is background, 1 to 10 the digits 0 to 9
    classes/{train,val}/{0..9}/*.jpg         crops of the digits, for classification

With --near-infrared, images are TIFF files of 16 bits with four bands: red, green, blue and a made near infrared.
"""

import argparse
import json
import shutil
import time
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
MIN_VISIBLE = 0.75  # share of a digit that stays visible below others
JPEG = (cv2.IMWRITE_JPEG_QUALITY, 92)
MARKER = 'mini_coco.txt'  # tells a folder that may be replaced from a user's own


def build_mini_coco(out_dir: Union[str, Path], near_infrared: bool = False) -> Dict[str, int]:
    """Writes the data set, or replaces an earlier one as a whole.

    The folder is built beside the target and renamed at the end. A killed build leaves it there, and the next one
    removes it.

    Args:
        out_dir: Folder to make, such as ``data/mini``.
        near_infrared: Write images of four bands and 16 bits, as TIFF.

    Returns:
        Number of digits by split.

    Raises:
        FileExistsError: The folder exists and was not written by this function.
        OSError: A file cannot be written, as on a full disk; the target is unchanged.
    """
    from sklearn.datasets import load_digits

    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / MARKER).exists():
        raise FileExistsError(f'{out_dir}: exists and is not a mini COCO data set; choose another folder')
    digits, labels = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8).astype(np.float32) / 16
    order = RandomState(0).permutation(len(digits))
    photos = _load_photos()
    counts = {}
    work = out_dir.with_name(f'.{out_dir.name}.building')
    new, old = work / 'new', work / 'old'
    if work.exists():
        shutil.rmtree(work)
    try:
        for split, samples in (('train', order[:NUM_TRAIN_DIGITS]), ('val', order[NUM_TRAIN_DIGITS:])):
            counts[split] = _write_split(new, split, digits[samples], labels[samples], photos, near_infrared)
        (new / MARKER).write_text('Made by make_mini_coco.py, which replaces the whole folder when it runs again.\n')
        if out_dir.exists():
            out_dir.rename(old)
        try:
            new.rename(out_dir)
        except BaseException:
            if old.exists():
                old.rename(out_dir)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts


def _load_photos() -> List[np.ndarray]:
    """Loads BGR photographs, each (480, W, 3)."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    rgb = list(load_sample_images().images)
    rgb += [load() for load in (data.astronaut, data.cat, data.coffee, data.rocket, data.retina)]
    photos = [np.ascontiguousarray(image[..., 2::-1]) for image in rgb]
    return [cv2.resize(photo, None, fx=480 / len(photo), fy=480 / len(photo)) for photo in photos]


def _write_split(
    root: Path, split: str, digits: np.ndarray, labels: np.ndarray, photos: List[np.ndarray], near_infrared: bool
) -> int:
    for folder in (root / split, root / 'semantic' / split, root / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(NUM_IMAGES[split]):
        rng = RandomState(index + 100_000 * (split == 'val'))
        image, masks, classes = _make_scene(rng, digits, labels, photos)
        height, width = image.shape[:2]
        file_name = f'{index + 1:06d}.{"tif" if near_infrared else "jpg"}'
        images.append(dict(id=index + 1, file_name=file_name, height=height, width=width))
        if near_infrared:
            _write_bands(root / split / file_name, image, _make_near_infrared(rng, image, masks))
        else:
            _write_image(root / split / file_name, image, JPEG)
        semantic = np.zeros((height, width), np.uint8)
        for mask, label in zip(masks, classes):
            semantic[mask] = label + 1
            encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = [int(x) for x in rle.toBbox(encoded)]
            ann_id = len(annotations) + 1
            annotations.append(
                dict(
                    id=ann_id,
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
            _write_image(folder / f'{ann_id:06d}.jpg', image[y : y + h, x : x + w], JPEG)
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
    # cv2.imwrite reports no error on a full disk.
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1])


def _write_bands(path: Path, image: np.ndarray, near_infrared: np.ndarray) -> None:
    """Writes a BGR image (H, W, 3) and a fourth band (H, W) of 8 bits as a TIFF of 16 bits, red first."""
    import tifffile

    bands = np.dstack([image[..., ::-1], near_infrared]).astype(np.uint16) * 257
    tifffile.imwrite(path, bands, photometric='minisblack', planarconfig='contig', compression='zlib')


def _make_near_infrared(rng: RandomState, image: np.ndarray, masks: List[np.ndarray]) -> np.ndarray:
    """Makes a band (H, W) in which digits of every color are bright, as plants are in near infrared."""
    band = 0.4 * image.mean(2) + 100 * np.any(masks, 0)
    return (band + rng.standard_normal(band.shape) * 10).clip(0, 255).astype(np.uint8)


def _make_scene(
    rng: RandomState, digits: np.ndarray, labels: np.ndarray, photos: List[np.ndarray]
) -> Tuple[np.ndarray, List[np.ndarray], List[int]]:
    """Makes an image (H, W, 3), the visible masks (H, W) of its digits, and their labels."""
    width, height = rng.choice(WIDTHS), rng.choice(HEIGHTS)
    photo = photos[rng.randint(len(photos))]
    top, left = rng.randint(len(photo) - height + 1), rng.randint(photo.shape[1] - width + 1)
    image = photo[top : top + height, left : left + width].astype(np.float32)
    if rng.rand() < 0.5:
        image = image[:, ::-1].copy()
    _add_clutter(rng, image)
    masks: List[np.ndarray] = []
    classes: List[int] = []
    full_areas: List[int] = []
    for _ in range(rng.randint(2, 6)):
        sample = rng.randint(len(digits))
        for _ in range(20):  # attempts to find a place that leaves the earlier digits visible
            alpha = _place(rng, digits[sample], height, width)
            mask = alpha > 0.5
            visible_areas = [(earlier & ~mask).sum() for earlier in masks]
            if all(visible >= MIN_VISIBLE * full for visible, full in zip(visible_areas, full_areas)):
                masks = [earlier & ~mask for earlier in masks] + [mask]
                classes.append(int(labels[sample]))
                full_areas.append(mask.sum())
                _paint(rng, image, alpha)
                break
    image += rng.standard_normal(image.shape) * 4
    return image.clip(0, 255).astype(np.uint8), masks, classes


def _place(rng: RandomState, digit: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales, rotates and shifts a digit (8, 8) to an alpha map (H, W) in [0, 1]."""
    size = rng.uniform(*DIGIT_SIZE)
    scale = np.array([size * rng.uniform(0.85, 1.15), size]) / 8
    angle = np.deg2rad(rng.uniform(-8, 8))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    margin = size / 2 + 2
    center = [rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)]
    matrix = np.column_stack([rotation, center - rotation @ [3.5, 3.5]])
    value = cv2.warpAffine(digit, matrix, (int(width), int(height)), flags=cv2.INTER_CUBIC)
    return ((value - 0.35) / 0.3).clip(0, 1)


def _paint(rng: RandomState, image: np.ndarray, alpha: np.ndarray) -> None:
    """Blends in a color that differs from the background, shaded from top to bottom."""
    background = image[alpha > 0.5].mean(0)
    colors = rng.uniform(0, 255, (4, 3))
    color = colors[np.abs(colors - background).sum(1).argmax()]
    shade = np.linspace(1, rng.uniform(0.7, 1.3), len(image))[:, None, None]
    image += alpha[..., None] * (color * shade - image)


def _add_clutter(rng: RandomState, image: np.ndarray) -> None:
    """Draws lines and ellipses in random colors: strokes that are no digits."""
    height, width = image.shape[:2]
    for _ in range(rng.randint(1, 4)):
        color = rng.uniform(0, 255, 3).tolist()
        start, end = ([int(rng.randint(width)), int(rng.randint(height))] for _ in range(2))
        if rng.rand() < 0.5:
            cv2.line(image, start, end, color, int(rng.randint(1, 6)), cv2.LINE_AA)
        else:
            axes = [int(rng.randint(3, 20)), int(rng.randint(3, 20))]
            cv2.ellipse(image, start, axes, float(rng.uniform(180)), 0, 360, color, int(rng.choice([-1, 2])))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out_dir', nargs='?', default='data/mini', help='folder to make; default: data/mini')
    parser.add_argument('--near-infrared', action='store_true', help='write images of four bands and 16 bits, as TIFF')
    args = parser.parse_args()
    started = time.time()
    try:
        counts = build_mini_coco(args.out_dir, args.near_infrared)
    except OSError as error:
        message = str(error)
        parser.exit(1, f'{message if args.out_dir in message else f"{args.out_dir}: {message}"}\n')
    digits = ', '.join(f'{count} digits to {split}' for split, count in counts.items())
    print(f'{args.out_dir}: {digits}, in {time.time() - started:.0f} s')


if __name__ == '__main__':
    main()
