"""Reading images: depth, bands, orientation, and other files in a folder."""

import struct
import zlib

import cv2
import mmcv
import numpy as np
import pytest
from PIL import Image

from mmvitzoo import images
from mmvitzoo.images import find_images, read_image

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # all 12-bit values
COLORS = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
RAMP_8_BIT = np.round(RAMP * (255 / 4095)).astype(np.uint8)
COLORS_8_BIT = np.round(COLORS * (255 / 4095)).astype(np.uint8)


@pytest.fixture
def log(monkeypatch):
    """Returns the list of logged lines."""
    lines = []
    monkeypatch.setattr(images, 'print_log', lambda message, **kwargs: lines.append(message))
    return lines


def write_tiff(path, *pages, **tags):
    """Writes uncompressed pages; OpenCV and Pillow do not write these numbers of bands and tags.

    Args:
        path: Path of the file.
        *pages: Samples, (H, W) or (H, W, bands).
        **tags: Values of tags, which replace those of a gray image, as in ``t262=2``.
    """
    content, link = bytearray(b'II*\0\0\0\0\0'), 4
    for page in pages:
        height, width, bands = np.atleast_3d(page).shape
        strip = len(content)
        content += page.tobytes()
        values = {256: width, 257: height, 258: [8 * page.itemsize] * bands, 259: 1, 262: 1, 273: strip, 277: bands}
        values.update({278: height, 279: len(content) - strip, 284: 1})
        values.update({int(tag[1:]): value for tag, value in tags.items()})
        entries = b''
        for tag, value in sorted(values.items()):
            numbers = np.atleast_1d(value)
            kind, data = (4, numbers.astype('<u4')) if tag in (273, 279) else (3, numbers.astype('<u2'))
            data = data.tobytes().ljust(4, b'\0')
            if len(data) > 4:
                content += data
                data = struct.pack('<I', len(content) - len(data))
            entries += struct.pack('<HHI', tag, kind, len(numbers)) + data
        struct.pack_into('<I', content, link, len(content))
        content += struct.pack('<H', len(values)) + entries
        link = len(content)
        content += bytes(4)
    path.write_bytes(content)
    return path


def write_png(path, image, significant_bits=None):
    """Writes a PNG file, with an sBIT chunk if there is a value for it."""
    data = cv2.imencode('.png', image)[1].tobytes()
    if significant_bits:
        chunk = b'sBIT' + bytes(significant_bits)
        chunk = struct.pack('>I', len(significant_bits)) + chunk + struct.pack('>I', zlib.crc32(chunk))
        data = data[:33] + chunk + data[33:]  # the header ends at byte 33
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------- depth


@pytest.mark.parametrize(
    'write, expected, source',
    [
        (lambda path: write_png(path, RAMP), RAMP_8_BIT, 'the largest is 4095'),
        (lambda path: write_png(path, COLORS[..., ::-1]), COLORS_8_BIT, 'the largest is 4095'),
        (lambda path: write_png(path, RAMP // 2, [12]), RAMP_8_BIT // 2, 'sBIT is 12'),
        (lambda path: write_png(path, COLORS[..., ::-1], [12, 10, 12]), COLORS_8_BIT, 'sBIT is 12'),
        (lambda path: write_tiff(path, RAMP), RAMP_8_BIT, 'the largest is 4095'),
        (lambda path: write_tiff(path, COLORS, t262=2), COLORS_8_BIT, 'the largest is 4095'),
        (lambda path: write_tiff(path, RAMP // 2, t281=4095), RAMP_8_BIT // 2, 'MaxSampleValue is 4095'),
        (lambda path: write_tiff(path, COLORS // 2, t262=2, t281=[4095] * 3), COLORS_8_BIT // 2, 'is 4095'),
        (lambda path: write_tiff(path, RAMP, t281=100), RAMP_8_BIT, 'the largest is 4095'),  # a wrong tag
        (lambda path: write_tiff(path, RAMP, t262=0), 255 - RAMP_8_BIT, 'the largest is 4095'),  # white is zero
    ],
)
def test_12_bit_data_in_16_bit_file_equal_8_bit_version(tmp_path, log, write, expected, source):
    image = read_image(write(tmp_path / 'a.image'))
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    difference = image.astype(int) - (expected[..., None] if expected.ndim == 2 else expected)
    assert abs(difference).max() <= 1
    (line,) = log
    assert line.startswith(str(tmp_path / 'a.image')) and '12-bit' in line and source in line


@pytest.mark.parametrize(
    'write',
    [
        lambda path: write_png(path, RAMP << 4 | RAMP >> 8),
        lambda path: write_png(path, RAMP << 4 | RAMP >> 8, [12]),  # scaled as the specification requires
        lambda path: write_png(path, (RAMP << 4 | RAMP >> 8) // 2, [12]),
        lambda path: write_png(path, RAMP, [16]),
        lambda path: write_tiff(path, RAMP << 4 | RAMP >> 8),
        lambda path: write_tiff(path, RAMP, t281=65535),
        lambda path: write_tiff(path, RAMP << 4, t262=0),
    ],
)
def test_full_range_16_bit_files_are_read_as_by_the_toolboxes(tmp_path, log, write):
    path = write(tmp_path / 'a.image')
    assert np.array_equal(read_image(path), mmcv.imread(path)[..., ::-1])
    assert not log


def test_packed_12_bit_tiff(tmp_path, log):
    pairs = RAMP.reshape(64, 32, 2).astype(np.uint32)
    packed = (pairs[..., 0] << 12 | pairs[..., 1])[..., None] >> np.array([16, 8, 0])  # three bytes for two samples
    path = write_tiff(tmp_path / 'a.tif', packed.astype(np.uint8).reshape(64, 96), t256=64, t258=12)
    assert np.array_equal(read_image(path)[..., 0], RAMP >> 4)
    assert not log


@pytest.mark.parametrize('largest', [0, 3, 255])
def test_8_bit_data_in_16_bit_file_keep_their_values(tmp_path, log, largest):
    image = np.minimum(RAMP, largest)
    assert np.array_equal(read_image(write_png(tmp_path / 'a.png', image))[..., 0], image)
    assert 'are read as 8-bit values' in log[0]


# ---------------------------------------------------------------- bands and sample types

GRAY = (RAMP >> 4).astype(np.uint8)


def bands(number, dtype=np.uint8):
    return np.stack([GRAY] * number, -1).astype(dtype)


@pytest.mark.parametrize(
    'pages, tags, message',
    [
        ([bands(2)], {}, '2 bands'),
        ([bands(2)], dict(t338=2), '2 bands'),
        ([bands(3)], dict(t338=[0, 0]), '3 bands and photometric interpretation 1'),  # bands of another meaning
        ([bands(4)], dict(t338=[0, 0, 0]), '4 bands and photometric interpretation 1'),
        ([bands(4)], dict(t262=2), '4 bands and photometric interpretation 2, without alpha'),
        ([bands(4)], dict(t262=2, t338=0), '4 bands'),
        ([bands(4, np.uint16)], dict(t262=2, t338=0), '4 bands'),
        ([bands(4)], dict(t262=5), '4 bands and photometric interpretation 5'),  # CMYK
        ([bands(5)], dict(t262=2, t338=[2, 0]), '5 bands'),
        ([bands(8, np.uint16)], {}, '8 bands'),
        ([GRAY] * 4, {}, '4 pages of the same size'),  # a stack of bands
        ([GRAY.astype(np.float32)], dict(t339=3), '32-bit floats'),
        ([bands(3, np.float32)], dict(t262=2, t339=[3] * 3), '32-bit floats'),
        ([GRAY.astype(np.float16)], dict(t339=3), '16-bit floats'),
        ([GRAY.astype(np.int16)], dict(t339=2), '16-bit signed integers'),
        ([GRAY.astype(np.uint32)], {}, '32-bit unsigned integers'),
        ([bands(3, np.uint16)], dict(t262=2, t284=2), '16-bit samples in separate planes'),
        ([bands(3, np.uint16)], dict(t262=8), '16-bit samples and photometric interpretation 8'),  # CIELAB
    ],
)
def test_unsupported_tiff_is_an_error(tmp_path, pages, tags, message):
    path = write_tiff(tmp_path / 'a.tif', *pages, **tags)
    with pytest.raises(ValueError, match=f'a.tif: TIFF with {message}.*; allowed are gray, RGB and RGBA'):
        read_image(path)


def test_other_formats_with_unsupported_samples_are_errors(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.hdr'), bands(3, np.float32))
    with pytest.raises(ValueError, match='a.hdr: samples of type float32; allowed are'):
        read_image(tmp_path / 'a.hdr')
    cv2.imwrite(str(tmp_path / 'a.jp2'), bands(4))
    with pytest.raises(ValueError, match='a.jp2: JPEG 2000 file with 4 bands; allowed are'):
        read_image(tmp_path / 'a.jp2')
    cv2.imwrite(str(tmp_path / 'b.jp2'), bands(3))
    assert np.array_equal(read_image(tmp_path / 'b.jp2'), bands(3))


@pytest.mark.parametrize('bits', [8, 16])
def test_alpha_is_dropped(tmp_path, bits):
    colors = (COLORS << 4).astype(np.uint16) if bits == 16 else COLORS_8_BIT
    expected = (colors >> (bits - 8)).astype(np.uint8)
    alpha = np.full((64, 64), (1 << bits) - 1, colors.dtype)
    write_tiff(tmp_path / 'a.tif', np.dstack([colors, alpha]), t262=2, t338=2)
    assert np.array_equal(read_image(tmp_path / 'a.tif'), expected)
    for channel in (alpha, COLORS[..., 0].astype(colors.dtype)):
        cv2.imwrite(str(tmp_path / 'a.png'), np.dstack([colors[..., ::-1], channel]))
        assert np.array_equal(read_image(tmp_path / 'a.png'), expected)


def test_overviews_and_masks_of_tiff_are_no_pages(tmp_path):
    overview = write_tiff(tmp_path / 'a.tif', GRAY, GRAY[::2, ::2].copy(), GRAY[::4, ::4].copy())
    assert np.array_equal(read_image(overview)[..., 0], GRAY)
    mask = write_tiff(tmp_path / 'b.tif', GRAY, GRAY, t254=4)
    assert np.array_equal(read_image(mask)[..., 0], GRAY)


# ---------------------------------------------------------------- ordinary files


MODES = {
    '.jpg': ('RGB', 'L', '1', 'CMYK'),
    '.png': ('RGB', 'L', '1', 'P', 'LA', 'RGBA'),
    '.bmp': ('RGB', 'L', '1', 'P', 'RGBA'),
    '.tif': ('RGB', 'L', '1', 'P', 'RGBA', 'YCbCr', 'LAB'),
    '.webp': ('RGB', 'L', 'RGBA'),
}


@pytest.mark.parametrize('suffix, mode', [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_ordinary_files_are_read_as_by_the_toolboxes(tmp_path, suffix, mode):
    picture, path = Image.fromarray(COLORS_8_BIT[:40]).convert(mode), tmp_path / f'a{suffix}'
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(path, **({} if suffix == '.bmp' else dict(exif=exif)))
        image = read_image(path)
        assert np.array_equal(image, mmcv.imread(path)[..., ::-1])
        if suffix == '.jpg':
            assert image.shape == ((64, 40, 3) if orientation == 6 else (40, 64, 3))


@pytest.mark.filterwarnings('ignore')  # of Pillow
def test_damaged_files_are_errors(tmp_path):
    path = write_tiff(tmp_path / 'a.tif', RAMP)
    data = path.read_bytes()
    looped = bytearray(data)
    looped[-4:] = data[4:8]  # the last directory points to itself
    path.write_bytes(looped)
    assert read_image(path).shape == (64, 64, 3)
    rng = np.random.default_rng(0)
    damaged = [b'', data[:6], data[:8], data[:-30], b'II*\0\xff\xff\xff\xff']
    for _ in range(300):
        changed = np.frombuffer(data, np.uint8).copy()
        start = len(data) - 130  # the directory
        changed[rng.integers(start, len(data), 3)] = rng.integers(0, 256, 3)
        damaged.append(changed.tobytes())
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert read_image(path).dtype == np.uint8
        except ValueError as error:
            assert str(error).startswith(f'{path}: ')
            refused += 1
    assert refused > 5


# ---------------------------------------------------------------- folders


def test_find_images_is_sorted_and_recursive(tmp_path, log):
    for name in ('b.JPG', 'sub/a.webp'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)] == ['b.JPG', 'sub/a.webp']
    assert find_images(tmp_path / 'b.JPG') == [tmp_path / 'b.JPG'] and not log


def test_find_images_counts_other_files(tmp_path, log):
    for name in ('a.jpg', 'a.gif', 'B.GIF', 'c.jp2', 'LICENSE'):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / 'a.jpg']
    assert log == [f'{tmp_path}: 1 images, passed over 2 .gif, 1 .jp2, 1 without suffix']
    (tmp_path / 'a.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='no image in this folder .*; passed over 2 .gif, 1 .jp2, 1 without'):
        find_images(tmp_path)
