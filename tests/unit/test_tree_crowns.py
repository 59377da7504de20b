"""tools/dataset_converters/make_tree_crowns.py: photographs with boxes become tiles in COCO format."""

import json
import zipfile

import cv2
import make_tree_crowns
import numpy as np
import pytest
from make_tree_crowns import TRAIN_PHOTO, TRANSFER_PHOTOS, build_tree_crowns, main, read_photos

SIZES = {TRAIN_PHOTO: (100, 75), TRANSFER_PHOTOS['yell']: (40, 30), TRANSFER_PHOTOS['osbs']: (20, 33)}  # (H, W)
SPLITS = {'train': TRAIN_PHOTO, 'val': TRAIN_PHOTO, **TRANSFER_PHOTOS}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(make_tree_crowns, 'TILE', 20)


@pytest.fixture
def wheel(tmp_path):
    """Writes a wheel with small noise images and random boxes, some of which touch the edges."""
    rng = np.random.RandomState(0)
    path = tmp_path / 'deepforest.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        for name, (height, width) in SIZES.items():
            image = rng.randint(0, 256, (height, width, 3), np.uint8)
            archive.writestr(f'deepforest/data/{name}.png', cv2.imencode('.png', image)[1].tobytes())
            boxes = ''
            for _ in range(40):
                x, y, w, h = rng.randint(1, width - 2), rng.randint(1, height - 2), rng.randint(2, 8), rng.randint(2, 8)
                right, bottom = min(x + w, width), min(y + h, height)
                corners = zip(('xmin', 'ymin', 'xmax', 'ymax'), (x, y, right, bottom))
                box = ''.join(f'<{key}>{value}</{key}>' for key, value in corners)
                boxes += f'<object><name>Tree</name><bndbox>{box}</bndbox></object>'
            archive.writestr(f'deepforest/data/{name}.xml', f'<annotation>{boxes}</annotation>')
    return path


def test_tiles_and_boxes_are_those_of_the_photographs(wheel, tmp_path):
    counts = build_tree_crowns(tmp_path / 'data', wheel)
    photos = read_photos(wheel)
    covered = {name: np.zeros((len(SPLITS), *size), int) for name, size in SIZES.items()}
    annotated = {name: [] for name in SIZES}
    for index, (split, name) in enumerate(SPLITS.items()):
        coco = json.loads((tmp_path / 'data/annotations' / f'instances_{split}.json').read_text())
        assert counts[split] == (len(coco['images']), sum(not ann['iscrowd'] for ann in coco['annotations']))
        for info in coco['images']:
            tile = cv2.imread(str(tmp_path / 'data' / split / info['file_name']))
            top, left = map(int, info['file_name'][:-4].split('_'))
            assert tile.shape == (20, 20, 3) == (info['height'], info['width'], 3)
            assert np.array_equal(tile, photos[name][0][top : top + 20, left : left + 20])
            covered[name][index, top : top + 20, left : left + 20] += 1
            shown = photos[name][1].clip((left, top, left, top), (left + 20, top + 20, left + 20, top + 20))
            shown -= (left, top, left, top)
            shown = [tuple(box) for box in shown if min(box[2:] - box[:2]) > 0]
            boxes = [ann for ann in coco['annotations'] if ann['image_id'] == info['id']]
            assert sorted((x, y, x + w, y + h) for x, y, w, h in (ann['bbox'] for ann in boxes)) == sorted(shown)
            assert all(ann['area'] == ann['bbox'][2] * ann['bbox'][3] for ann in boxes)
            annotated[name] += [ann['area'] for ann in boxes if not ann['iscrowd']]
    for name, (_, boxes) in photos.items():
        # Every pixel is in one split, and every crown is annotated once, with a quarter of its area or more.
        assert (covered[name].sum(0) > 0).all() and ((covered[name] > 0).sum(0) == 1).all()
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
        assert len(annotated[name]) == len(boxes) == 40 and sum(annotated[name]) > 0.8 * areas.sum()
    assert covered[TRAIN_PHOTO][0].any(1).sum() == 75  # the upper three quarters


def test_second_build_replaces_the_first_and_no_other_folder(wheel, tmp_path, capsys):
    build_tree_crowns(tmp_path / 'data', wheel)
    (tmp_path / 'data/train/old.png').write_text('')
    build_tree_crowns(tmp_path / 'data', wheel)
    assert not (tmp_path / 'data/train/old.png').exists()
    (tmp_path / 'photos').mkdir()
    with pytest.raises(SystemExit):
        main([str(tmp_path / 'photos'), '--wheel', str(wheel)])
    assert 'photos: exists and is not a data set of tree crowns; choose another' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'deepforest.whl', 'photos']


@pytest.mark.parametrize('problem', ['no wheel', 'other wheel', 'no network'])
def test_errors_are_one_line(problem, tmp_path, capsys, monkeypatch):
    arguments = [str(tmp_path / 'data')]
    if problem == 'no network':
        monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
        monkeypatch.setenv('PIP_RETRIES', '0')
        expected = 'deepforest==2.1.0 cannot be downloaded (ERROR: No matching distribution found'
    else:
        with zipfile.ZipFile(tmp_path / 'other.whl', 'w') as archive:
            archive.writestr('readme', '')
        name, expected = ('nowhere.whl', 'No such file') if problem == 'no wheel' else ('other.whl', 'is not the wheel')
        arguments += ['--wheel', str(tmp_path / name)]
    with pytest.raises(SystemExit) as error:
        main(arguments)
    message = capsys.readouterr().err
    assert error.value.code == 1 and expected in message and message.count('\n') == 1
    assert not (tmp_path / 'data').exists() and not list(tmp_path.glob('.*'))
