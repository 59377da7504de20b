"""tools/dataset_converters/make_mini_coco.py: the demonstration data."""

import json
from pathlib import Path

import cv2
import make_mini_coco
import numpy as np
import pytest
from make_mini_coco import CLASSES, build_mini_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


@pytest.fixture(scope='module')
def mini(workspace):
    return workspace / 'data' / 'mini'


@pytest.mark.parametrize('split, number', [('train', 400), ('val', 100)])
def test_coco(mini, split, number):
    coco = COCO(str(mini / 'annotations' / f'instances_{split}.json'))
    assert len(coco.imgs) == number and [coco.cats[i + 1]['name'] for i in range(10)] == list(CLASSES)
    for info in coco.imgs.values():
        image = cv2.imread(str(mini / split / info['file_name']))
        semantic = cv2.imread(str(mini / 'semantic' / split / f'{Path(info["file_name"]).stem}.png'), -1)
        assert image.shape == (info['height'], info['width'], 3)
        assert min(image.shape[:2]) >= 160 and max(image.shape[:2]) <= 256
        annotations = coco.loadAnns(coco.getAnnIds(info['id']))
        assert 2 <= len(annotations) <= 5
        covered = np.zeros(image.shape[:2], int)
        for ann in annotations:
            mask = coco.annToMask(ann).astype(bool)
            rows, columns = np.nonzero(mask)
            x, y, w, h = ann['bbox']
            assert (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1) == (x, y, w, h)
            assert ann['area'] == mask.sum() > 50 and (semantic[mask] == ann['category_id']).all()
            covered += mask
        # Masks hold visible pixels, so that no pixel belongs to two.
        assert covered.max() == 1 and (semantic[covered == 0] == 0).all()
    assert {ann['category_id'] for ann in coco.anns.values()} == set(range(1, 11))
    crops = sorted((mini / 'classes' / split).glob('*/*.jpg'))
    assert len(crops) == len(coco.anns) and {path.parent.name for path in crops} == set(CLASSES)


def test_perfect_predictions_score_one(mini):
    """pycocotools evaluates with the annotation file."""
    truth = COCO(str(mini / 'annotations' / 'instances_val.json'))
    results = truth.loadRes([{**ann, 'score': 1.0} for ann in truth.anns.values()])
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] > 0.999


def test_train_and_val_share_no_digit(monkeypatch, tmp_path):
    seen = {}

    def record(root, split, digits, labels, photos, near_infrared):
        root.mkdir(parents=True, exist_ok=True)
        seen[split] = {digit.tobytes() for digit in digits}
        return 0

    monkeypatch.setattr(make_mini_coco, '_write_split', record)
    build_mini_coco(tmp_path / 'mini')
    assert len(seen['train']) == 1400 and len(seen['val']) == 397 and not seen['train'] & seen['val']


def test_same_files_every_time(mini, tmp_path, monkeypatch):
    """An image depends on its number alone; a second build replaces the data set."""
    monkeypatch.setattr(make_mini_coco, 'NUM_IMAGES', dict(train=12, val=3))
    for _ in range(2):
        build_mini_coco(tmp_path / 'mini')
    files = sorted(path.relative_to(tmp_path / 'mini') for path in (tmp_path / 'mini').rglob('*') if path.is_file())
    assert len(files) > 50
    for path in files:
        if path.suffix == '.json':
            whole, part = (json.loads((folder / path).read_text()) for folder in (mini, tmp_path / 'mini'))
            for kind in ('images', 'annotations'):
                assert part[kind] and part[kind] == whole[kind][: len(part[kind])]
            assert part['categories'] == whole['categories']
        else:
            assert (mini / path).read_bytes() == (tmp_path / 'mini' / path).read_bytes(), path
    assert sorted(path.name for path in tmp_path.iterdir()) == ['mini']


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'holiday.jpg').write_text('mine')
    with pytest.raises(FileExistsError, match='photos: exists and is not a mini COCO data set'):
        build_mini_coco(tmp_path / 'photos')
    assert [path.name for path in tmp_path.rglob('*')] == ['photos', 'holiday.jpg']


def test_interrupted_build_leaves_the_old_one(mini, tmp_path, monkeypatch):
    target = tmp_path / 'mini'
    target.mkdir()
    (target / make_mini_coco.MARKER).write_text('old')

    def interrupt(*args):
        raise KeyboardInterrupt

    def rename(source, goal, rename=Path.rename):
        return interrupt() if source.name == 'new' else rename(source, goal)

    monkeypatch.setattr(make_mini_coco, 'NUM_IMAGES', dict(train=2, val=2))
    for owner, name, function in ((Path, 'rename', rename), (make_mini_coco, '_write_split', interrupt)):
        monkeypatch.setattr(owner, name, function)
        with pytest.raises(KeyboardInterrupt):
            build_mini_coco(target)
    assert [path.name for path in tmp_path.rglob('*')] == ['mini', make_mini_coco.MARKER]
    assert (target / make_mini_coco.MARKER).read_text() == 'old'


def test_config_reads_it(mini):
    """The classes of the config are those of the annotations."""
    from mmengine.config import Config

    config = Config.fromfile('configs/_base_/datasets/mini_coco_instance.py')
    names = [x['name'] for x in json.loads((mini / 'annotations' / 'instances_val.json').read_text())['categories']]
    assert list(config.metainfo.classes) == names == list(CLASSES)
