"""Images from files, arrays and Pillow as 8-bit RGB arrays."""

import io
import logging
import struct
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
from mmengine.logging import print_log
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
ALLOWED = 'allowed are gray, RGB and RGBA images of 8- or 16-bit unsigned integers'
PILLOW_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')
PNG = b'\x89PNG\r\n\x1a\n'
TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # in both byte orders; + is BigTIFF
JPEG2000 = b'\0\0\0\x0cjP  '
TAGS = dict(
    subfile_type=(254, 0),
    width=(256, 0),
    height=(257, 0),
    bits=(258, 1),
    photometric=(262, 1),
    samples=(277, 1),
    max_value=(281, 0),
    planes=(284, 1),
    extra_sample=(338, 0),
    sample_format=(339, 1),
)  # numbers and default values of TIFF tags
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR, CIELAB = 0, 1, 2, 6, 8  # photometric interpretations
SAMPLE_FORMATS = {1: 'unsigned integers', 2: 'signed integers', 3: 'floats', 4: 'undefined type'}


def find_images(path: Union[str, Path]) -> List[Path]:
    """Lists the images in a folder, and logs the number of other files by suffix.

    Args:
        path: Folder, searched recursively for files with one of ``IMAGE_SUFFIXES``; or one image with any suffix.

    Returns:
        Sorted paths.

    Raises:
        FileNotFoundError: There is no such file or folder, or the folder contains no image.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: no such image or folder')
    files = sorted(x for x in path.rglob('*') if x.is_file())
    images = [x for x in files if x.suffix.lower() in IMAGE_SUFFIXES]
    counts = Counter(x.suffix.lower() or 'without suffix' for x in files if x.suffix.lower() not in IMAGE_SUFFIXES)
    others = ', '.join(f'{count} {suffix}' for suffix, count in sorted(counts.items()))
    if not images:
        found = f'; passed over {others}' if others else ''
        raise FileNotFoundError(f'{path}: no image in this folder ({", ".join(IMAGE_SUFFIXES)}){found}')
    if others:
        print_log(f'{path}: {len(images)} images, passed over {others}', logger='current', level=logging.WARNING)
    return images


def read_image(path: Union[str, Path]) -> np.ndarray:
    """Reads an image as the toolboxes do, scales 16-bit samples by their real depth, and converts the image to RGB.

    An alpha channel is dropped. The depth of a 16-bit file is the one that it declares (sBIT of PNG, MaxSampleValue of
    TIFF), else the number of bits of its largest sample. A depth below 16 bits is logged.

    Args:
        path: Image file in a format that OpenCV reads.

    Returns:
        Image, (H, W, 3), uint8, RGB.

    Raises:
        ValueError: There is no such file, it is not an image, or its samples or bands are not supported.
    """
    if not Path(path).is_file():
        raise ValueError(f'{path}: no such image')
    data = Path(path).read_bytes()
    tags: Dict[str, int] = {}
    try:
        if data.startswith(TIFF):
            tags = _read_tiff_tags(data)
            reason = _unsupported_tiff(tags)
            if reason:
                raise ValueError(f'{path}: {reason}; {ALLOWED}')
        # The flags apply the orientation of EXIF, as IMREAD_COLOR does; IMREAD_UNCHANGED would not.
        image = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        if data.startswith(JPEG2000) and _decode(data, cv2.IMREAD_UNCHANGED).shape[2:] == (4,):
            raise ValueError(f'{path}: JPEG 2000 file with 4 bands; {ALLOWED}')
    except (cv2.error, _UnreadableError):
        raise ValueError(f'{path}: cannot be read as an image') from None
    if image.dtype == np.uint16:
        largest = int(image.max())
        bits, source = _significant_bits(data, tags, largest)
        bits = max(bits, 8)
        if bits < 16:
            message = f'{path}: samples of the 16-bit file are read as {bits}-bit values ({source})'
            print_log(message, logger='current', level=logging.WARNING)
        image = (image >> (bits - 8)).astype(np.uint8)  # the toolboxes shift by 8 bits
        if tags.get('photometric') == WHITE_IS_ZERO:  # OpenCV inverts 8-bit samples only
            image = 255 - image
    elif image.dtype != np.uint8:
        raise ValueError(f'{path}: samples of type {image.dtype}; {ALLOWED}')
    return np.ascontiguousarray(image[..., ::-1])


def to_rgb(image: Union[str, Path, np.ndarray, Image.Image]) -> np.ndarray:
    """Converts an image to RGB, or reads it with :func:`read_image`.

    Args:
        image: Image file; array of (H, W) or (H, W, 3), uint8, gray or RGB; or image of Pillow with 8-bit samples. The
            orientation of EXIF is applied, an alpha channel is dropped. Arrays of ``cv2.imread`` are BGR: pass
            ``image[..., ::-1]``.

    Returns:
        Image, (H, W, 3), uint8, RGB.

    Raises:
        TypeError: The image has another type.
        ValueError: It has other samples or bands, or the file cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        if image.mode not in PILLOW_MODES:
            raise ValueError(f'images of Pillow have one of the modes {", ".join(PILLOW_MODES)}, got {image.mode}')
        return np.array(ImageOps.exif_transpose(image).convert('RGB'))
    if not isinstance(image, np.ndarray):
        raise TypeError(f'an image is a path, an array or an image of Pillow, got {type(image).__name__}')
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        raise ValueError(
            f'arrays are (H, W) or (H, W, 3) of uint8, gray or RGB, got {image.dtype} of {tuple(image.shape)}'
        )
    return np.ascontiguousarray(image if image.ndim == 3 else np.stack([image] * 3, -1))


class _UnreadableError(Exception):
    """Data that is not an image."""


def _decode(data: bytes, flags: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise _UnreadableError
    return image


def _read_tiff_tags(data: bytes) -> Dict[str, int]:
    """Returns the largest value of each of ``TAGS`` in the first page, and the number of pages of its size."""
    file, header = io.BytesIO(data), data[: 16 if b'+' in data[:4] else 8]
    pages: List[Dict[str, int]] = []
    try:
        offset, seen = ImageFileDirectory_v2(header).next, set()
        while offset and offset not in seen:
            seen.add(offset)
            file.seek(offset)
            directory = ImageFileDirectory_v2(header)
            directory.load(file)
            pages.append({name: _largest(directory.get(tag, default)) for name, (tag, default) in TAGS.items()})
            offset = directory.next
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):  # Pillow's, for invalid files
        raise _UnreadableError from None
    if not pages:
        raise _UnreadableError
    # Overviews are smaller; masks have bit 2 of the subfile type.
    size = (pages[0]['width'], pages[0]['height'])
    same = [page for page in pages if (page['width'], page['height']) == size and not page['subfile_type'] & 4]
    return dict(pages[0], pages=len(same))


def _largest(value: Any) -> int:
    return int(max(value) if isinstance(value, Sequence) else value)


def _unsupported_tiff(tags: Dict[str, int]) -> Optional[str]:
    """Describes the property of a TIFF file that OpenCV reads wrongly or not at all; None if there is none."""
    bits, samples, photometric = tags['bits'], tags['samples'], tags['photometric']
    if tags['sample_format'] not in (1, 4) or bits > 16:
        return f'TIFF with {bits}-bit {SAMPLE_FORMATS.get(tags["sample_format"], "complex numbers")}'
    bands = 3 if photometric in (RGB, YCBCR, CIELAB) else 1
    is_rgba = photometric == RGB and samples == 4 and tags['extra_sample'] in (1, 2)
    if samples != bands and not is_rgba:
        return f'TIFF with {samples} bands and photometric interpretation {photometric}, without alpha after RGB'
    if tags['pages'] > 1:
        return f'TIFF with {tags["pages"]} pages of the same size'
    if bits > 8 and photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        return f'TIFF with {bits}-bit samples and photometric interpretation {photometric}'
    if bits > 8 and samples > 1 and tags['planes'] == 2:
        return f'TIFF with {bits}-bit samples in separate planes instead of interleaved'
    return None


def _significant_bits(data: bytes, tags: Dict[str, int], largest: int) -> Tuple[int, str]:
    """Returns the depth of samples in a 16-bit array and the source of that number."""
    if tags:
        if tags['bits'] < 16:  # packed samples, which OpenCV scales to 16 bits
            return 16, 'BitsPerSample'
        if largest <= tags['max_value']:
            return tags['max_value'].bit_length(), f'MaxSampleValue is {tags["max_value"]}'
    elif data.startswith(PNG):
        bits = _png_significant_bits(data)
        if bits:  # PNG requires samples that are scaled to 16 bits; some writers do not scale them
            return (bits if largest < 1 << bits else 16), f'sBIT is {bits}'
    return largest.bit_length(), f'the largest is {largest}'


def _png_significant_bits(data: bytes) -> Optional[int]:
    """Reads the largest number of significant bits of a color in the sBIT chunk, or None without that chunk."""
    has_alpha, position = data[25] & 4, len(PNG)
    while position + 8 <= len(data):
        length, name = struct.unpack_from('>I4s', data, position)
        if name == b'sBIT':
            values = data[position + 8 : position + 8 + length]
            return max(values[:-1] if has_alpha else values, default=None)
        position += length + 12  # length, name and checksum
    return None
