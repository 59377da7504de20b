"""From a folder in COCO's format to a config that trains on it."""

import json
import re
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, PARAM_SCHEDULERS, init_default_scope
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmvitzoo import get_config
from mmvitzoo.checkpoints import export
from mmvitzoo.datasets import adapt_config, read_coco_folder

ROOT = Path(__file__).resolve().parents[2]
# Ids have gaps and do not rise; labels follow the file.
CATEGORIES = [dict(id=7, name='owl'), dict(id=3, name='big cat'), dict(id=20, name="dog's tail")]
CLASSES = ['owl', 'big cat', "dog's tail"]
MINI = 'retinanet_scalablevit-mini_fpn_mini-coco'
MASKS = 'mask-rcnn_mpvit-tiny_fpn_1x_coco'


@pytest.fixture(scope='session')
def annotations(workspace):
    """Of four images of each split of the demonstration data, in three classes."""
    found = {}
    for split in ('train', 'val'):
        coco = json.loads((workspace / 'data' / 'mini' / 'annotations' / f'instances_{split}.json').read_text())
        images = coco['images'][:4]
        kept = [ann for ann in coco['annotations'] if ann['image_id'] <= 4]
        for ann in kept:
            ann['category_id'] = CATEGORIES[ann['category_id'] % 3]['id']
        found[split] = dict(images=images, annotations=kept, categories=CATEGORIES)
    return found


@pytest.fixture
def lay_out(workspace, annotations, tmp_path, monkeypatch):
    """Writes a folder `own` and goes to where it lies; changes the annotations by a function."""
    monkeypatch.chdir(tmp_path)

    def lay_out(files='annotations/instances_{}2017.json', images='{}2017', change=None, splits=('train', 'val')):
        for split, name in zip(('train', 'val'), splits):
            coco = json.loads(json.dumps(annotations[split]))
            if change:
                change(coco)
            path = tmp_path / 'own' / files.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(coco))
            folder = tmp_path / 'own' / images.format(name)
            folder.mkdir(parents=True, exist_ok=True)
            for image in annotations[split]['images']:
                shutil.copy(workspace / 'data' / 'mini' / split / image['file_name'], folder / image['file_name'])
        return 'own'

    return lay_out


def without_masks(coco, number=None):
    for ann in coco['annotations'][:number]:
        ann['segmentation'] = []


@pytest.mark.parametrize(
    'name, heads',
    [
        (MINI, 1),
        (MASKS, 2),
        ('cascade-mask-rcnn_mpvit-small_fpn_ms-3x_coco', 4),
        ('deformable-detr_mpvit-small_16xb2-50e_coco', 1),
        ('mask-rcnn_vitae-small_lsj-100e_coco', 2),  # repeats its data set
    ],
)
def test_adapted_config(name, heads, lay_out, annotations):
    """The model has the classes, in every head; the data sets have the images and the right labels."""
    folder = lay_out()
    adapt_config(name, folder, 'configs/my_config.py')
    config = Config.fromfile('configs/my_config.py')
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(dict(config.model, backbone=get_config(MINI).model.backbone))
    roi_heads = [model.roi_head] if hasattr(model, 'roi_head') else []
    found = [head for part in roi_heads for kind in ('bbox_head', 'mask_head') for head in flat(getattr(part, kind))]
    found = found or [model.bbox_head]
    assert len(found) == heads and all(head.num_classes == 3 for head in found)

    for split, loader in (('train', config.train_dataloader), ('val', config.val_dataloader)):
        dataset = DATASETS.build(loader.dataset)
        coco = annotations[split]
        assert dataset.metainfo['classes'] == CLASSES
        assert len(dataset) == 4 * loader.dataset.get('times', 1)
        names = {category['id']: category['name'] for category in CATEGORIES}
        for number in range(4):
            info = dataset.get_data_info(number)
            expected = [ann for ann in coco['annotations'] if ann['image_id'] == info['img_id']]
            assert [CLASSES[x['bbox_label']] for x in info['instances']] == [names[x['category_id']] for x in expected]
        sample = dataset[0]['data_samples']
        assert sample.gt_instances.labels.tolist() or split == 'train'  # a crop may leave none
        assert f'own/{split}2017/' in sample.img_path
    assert config.test_dataloader == config.val_dataloader and config.test_evaluator == config.val_evaluator
    metric = METRICS.build(config.val_evaluator)
    assert metric.metrics == (['bbox', 'segm'] if heads > 1 else ['bbox'])
    assert metric._coco_api.get_cat_ids(CLASSES) == [7, 3, 20]


def flat(head):
    return list(head) if isinstance(head, torch.nn.ModuleList) else [head]


def test_differs_in_nothing_else(lay_out):
    """Without options: data, classes and learning rate."""
    adapt_config(MASKS, lay_out(), 'mine.py')
    base, mine = get_config(MASKS), Config.fromfile('mine.py')
    changed = {key for key in mine if mine[key] != base.get(key)}
    loaders, evaluators = ({f'{split}_{kind}' for split in ('val', 'test')} for kind in ('dataloader', 'evaluator'))
    assert changed == {
        *('model', 'train_dataloader', *loaders, *evaluators, 'optim_wrapper', 'auto_scale_lr'),
        *('classes', 'num_classes', 'data_root'),
    }
    assert mine.train_dataloader.dataset.pipeline == base.train_dataloader.dataset.pipeline
    assert mine.model.backbone == base.model.backbone and mine.custom_imports == base.custom_imports
    text = Path('mine.py').read_text()
    assert len(text.splitlines()) < 50 and re.search(r"^_base_ = '\.\./.*configs/mpvit/mask-rcnn\S+py'$", text, re.M)


@pytest.mark.parametrize(
    'name, options, lr, base_batch_size',
    [
        (MASKS, dict(batch_size=4), 1e-4 * 4 / 16, 4),
        ('deformable-detr_mpvit-small_16xb2-50e_coco', dict(batch_size=1), 2e-4 / 32, 1),
        (MINI, dict(batch_size=6), 15e-4, 6),  # made for one process
    ],
)
def test_learning_rate(name, options, lr, base_batch_size, lay_out):
    adapt_config(name, lay_out(), 'mine.py', **options)
    config = Config.fromfile('mine.py')
    assert config.optim_wrapper.optimizer.lr == pytest.approx(lr)
    assert config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == base_batch_size
    assert config.auto_scale_lr.enable is False


def test_epochs_of_a_training_by_iterations(lay_out):
    """Nine tenths of the images have boxes, and the others are left out: 18 images, 9 iterations an epoch."""

    def change(coco):
        coco['images'] = [dict(coco['images'][i % 4], id=i + 1) for i in range(20)]
        ann = coco['annotations'][0]
        coco['annotations'] = [dict(ann, id=i + 1, image_id=i + 1) for i in range(18)]

    report = adapt_config('retinanet_mpvit-tiny_fpn_ms-3x_coco', lay_out(change=change), 'mine.py', epochs=30)
    config = Config.fromfile('mine.py')
    assert config.train_cfg == dict(type='IterBasedTrainLoop', max_iters=270, val_interval=10)
    warm_up, steps = config.param_scheduler
    assert warm_up == dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=27)
    assert steps == dict(type='MultiStepLR', by_epoch=False, begin=0, end=270, milestones=[210, 250], gamma=0.1)
    assert (config.default_hooks.checkpoint.interval, config.default_hooks.checkpoint.by_epoch) == (10, False)
    assert 'training  30 epochs, 270 iterations of 2 images' in report


def test_epochs_of_a_training_by_epochs(lay_out):
    folder = lay_out()
    adapt_config('retinanet_scalablevit-small_fpn_ms-3x_coco', folder, 'mine.py', epochs=12, batch_size=1)
    config = Config.fromfile('mine.py')
    assert (config.train_cfg.max_epochs, config.train_cfg.val_interval) == (12, 1)
    warm_up, steps = config.param_scheduler
    assert warm_up.end == 4 and steps.milestones == [9, 11] and steps.end == 12
    assert config.default_hooks.checkpoint.interval == 1

    # A warm-up of two iterations, the shortest that there is, has an end.
    adapt_config(MINI, folder, 'short.py', epochs=1, batch_size=1)
    warm_up = Config.fromfile('short.py').param_scheduler[0]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    scheduler = PARAM_SCHEDULERS.build(dict(warm_up, optimizer=optimizer))
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert warm_up.end == 2 and optimizer.param_groups[0]['lr'] == pytest.approx(1)

    adapt_config(MINI, folder, 'mini.py', epochs=1000)  # long enough for the whole warm-up
    config = Config.fromfile('mini.py')
    warm_up, cosine = config.param_scheduler
    assert (config.train_cfg.val_interval, warm_up.end, cosine.T_max) == (500, 50, 1000)

    # Its epoch is four times the data; ours is the data.
    (line,) = [x for x in adapt_config('mask-rcnn_vitae-small_lsj-100e_coco', folder, 'a.py') if 'training' in x]
    assert line == 'training  25 epochs, 50 iterations of 8 images'
    adapt_config('mask-rcnn_vitae-small_lsj-100e_coco', folder, 'b.py', epochs=5)
    config = Config.fromfile('b.py')
    assert config.train_dataloader.dataset.times == 1 and config.param_scheduler[1].milestones == [4, 5]


@pytest.mark.parametrize(
    'layout, ann_file, img_dir',
    [
        (dict(), 'annotations/instances_val2017.json', 'val2017/'),
        (
            dict(files='annotations/instances_{}.json', images='images/{}'),
            'annotations/instances_val.json',
            'images/val/',
        ),
        (dict(files='annotations/{}.json', images='images/{}/'), 'annotations/val.json', 'images/val/'),
        (
            dict(files='{}/_annotations.coco.json', images='{}', splits=('train', 'valid')),
            'valid/_annotations.coco.json',
            'valid/',
        ),
    ],
)
def test_layouts(layout, ann_file, img_dir, lay_out):
    train, val = read_coco_folder(lay_out(**layout))
    assert (val.ann_file, val.img_dir) == (ann_file, img_dir)
    assert (train.img_dir, train.num_images) == (img_dir.replace('valid', 'train').replace('val', 'train'), 4)
    assert train.classes == CLASSES and sum(train.boxes) == train.num_masks > 4


@pytest.mark.parametrize('images', ['images', '.'])
def test_images_of_both_splits_in_one_folder(images, lay_out):
    """File names may lead there from the folder itself."""

    def change(coco):
        for image in coco['images']:
            image['file_name'] = f'train2017/{image["file_name"]}'

    lay_out(images=f'{images}/train2017', change=change)
    assert read_coco_folder('own')[1].img_dir == f'{images}/'


def test_boxes_alone(lay_out):
    """A config with masks is refused, and another one named; one for boxes stops reading masks."""
    folder = lay_out(change=partial(without_masks, number=2))
    message = f'{MASKS} learns masks, which 4 of .* annotations lack; a config for boxes is retinanet_mpvit-tiny_fpn_1x'
    with pytest.raises(ValueError, match=message):
        adapt_config(MASKS, folder, 'mine.py')
    adapt_config(MINI, folder, 'mine.py')
    config = Config.fromfile('mine.py')
    init_default_scope('mmdet')
    for loader in (config.train_dataloader, config.val_dataloader):
        sample = DATASETS.build(loader.dataset)[0]['data_samples']
        assert len(sample.gt_instances.bboxes) > 1 and 'masks' not in sample.gt_instances


def test_checkpoints(lay_out, tmp_path):
    """A backbone replaces what the config starts from; a whole detector is loaded by the runner."""
    folder = lay_out()
    backbone = MODELS.build(dict(type='MPViT', arch='tiny')).state_dict()
    torch.save(backbone, 'backbone.pth')
    report = adapt_config(MASKS, folder, 'mine.py')
    assert any('starts from checkpoints/mpvit_tiny.pth, which is not there' in line for line in report)
    for name in (MASKS, 'mask-rcnn_mpvit-tiny_fpn_mini-coco'):  # which starts from random weights of its own kind
        report = adapt_config(name, folder, 'mine.py', checkpoint='backbone.pth', overwrite=True)
        config = Config.fromfile('mine.py')
        assert config.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='backbone.pth')
        assert config.load_from is None and not any('starts from' in line for line in report)

    detector = {**{f'backbone.{key}': x for key, x in backbone.items()}, 'rpn_head.rpn_cls.bias': torch.zeros(3)}
    torch.save({'state_dict': detector}, 'detector.pth')
    adapt_config(MASKS, folder, 'mine.py', checkpoint='detector.pth', overwrite=True)
    config = Config.fromfile('mine.py')
    assert config.model.backbone.init_cfg is None and config.load_from == 'detector.pth'

    # One of another layout is refused: the runner, which would load it, does not convert.
    theirs = export({key: x for key, x in detector.items() if key.startswith('backbone.')}, 'mpvit', 'detectron2')
    rpn = dict.fromkeys(('weight', 'bias'), torch.zeros(3))
    theirs.update({f'proposal_generator.rpn_head.objectness_logits.{leaf}': x for leaf, x in rpn.items()})
    torch.save({'model': theirs}, 'detectron2.pth')
    for checkpoint, message in (
        ('detectron2.pth', 'of the detectron2 layout; tools/model_converters/official2mm.py makes'),
        ('nowhere.pth', 'nowhere.pth: no such checkpoint'),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            adapt_config(MASKS, folder, 'other.py', checkpoint=checkpoint)
    assert not (tmp_path / 'other.py').exists()


def test_more_classes_than_colours(lay_out):
    """CocoDataset's palette ends after COCO's classes."""
    from mmdet.visualization import get_palette

    def change(coco):
        coco['categories'] = [*CATEGORIES, *(dict(id=100 + i, name=f'class {i}') for i in range(90))]

    report = adapt_config(MINI, lay_out(change=change), 'mine.py')
    assert sum('no box to learn from: class 0, class 1' in line for line in report) == 1
    init_default_scope('mmdet')
    dataset = DATASETS.build(Config.fromfile('mine.py').val_dataloader.dataset)
    assert len(get_palette(dataset.metainfo['palette'], 93)) == len(dataset.metainfo['classes']) == 93


def test_odd_boxes(lay_out):
    """A few are told of; many mean that the numbers are something else."""

    def shift(coco, number):
        for ann in coco['annotations'][:number]:
            ann['bbox'] = [ann['bbox'][0], ann['bbox'][1], 500, 500]

    report = adapt_config(MINI, lay_out(change=partial(shift, number=1)), 'mine.py')
    assert (
        sum(bool(re.search('1 of [0-9]+ boxes .* such as .*500, 500] of annotation 1', line)) for line in report) == 2
    )
    with pytest.raises(ValueError, match=r'9 of .*; a box is \[left, top, width, height\] in pixels'):
        read_coco_folder(lay_out(change=partial(shift, number=9)))


def test_id_zero(lay_out):
    """What the note says is so: perfect detections do not score one, as they do with other ids."""
    scores = []
    for first in (1, 0):

        def number(coco, first=first):
            for i, ann in enumerate(coco['annotations'], first):
                ann['id'] = i

        report = adapt_config(MINI, lay_out(change=number), 'mine.py', overwrite=True)
        notes = [line for line in report if 'the id 0 counts as never found' in line]
        assert len(notes) == (first == 0) and all('instances_val2017.json' in note for note in notes)
        truth = COCO('own/annotations/instances_val2017.json')
        kept = ('image_id', 'category_id', 'bbox')
        found = [dict({key: ann[key] for key in kept}, score=1) for ann in truth.dataset['annotations']]
        evaluation = COCOeval(truth, truth.loadRes(found), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores.append(evaluation.stats[0])
    assert scores[0] > 0.999 and scores[1] < 0.98


def set_in(kind, **values):
    return lambda coco: coco[kind][1].update(values)


def drop(kind, key):
    return lambda coco: coco[kind][1].pop(key)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda coco: coco.pop('categories'), 'has no categories; needed are categories, images, annotations'),
        (lambda coco: coco.update(annotations=[]), 'has no annotations;'),
        (lambda coco: coco.update(images=[1]), "file_name, height, width not as in COCO's images: 1$"),
        (drop('annotations', 'iscrowd'), "iscrowd not as in COCO's annotations: {"),
        (drop('images', 'height'), "height not as in COCO's images"),
        (set_in('categories', name=5), "name not as in COCO's categories"),
        (set_in('categories', id=7), '2 categories have the id 7'),
        (set_in('annotations', image_id=99), 'annotation 2 has image_id 99, which is not there'),
        (set_in('annotations', category_id=1), 'annotation 2 has category_id 1, which is not there'),
        (set_in('annotations', bbox=[1, 2, 3]), r'the box of annotation 2 is not four numbers: \[1, 2, 3\]'),
        (set_in('annotations', bbox=[1, 2, 3, float('nan')]), 'the box of annotation 2 is not four numbers'),
        (
            set_in('images', file_name='x.jpg'),
            'own: 1 of 4 images of annotations/instances_train2017.json are missing, such as x.jpg; '
            'looked in train2017/, ./',
        ),
    ],
)
def test_broken_annotations(change, message, lay_out):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_coco_folder(lay_out(change=change))
    assert '\n' not in str(error.value) and 'own' in str(error.value)


def test_splits_that_do_not_belong_together(lay_out, tmp_path):
    lay_out()
    path = tmp_path / 'own' / 'annotations' / 'instances_val2017.json'
    coco = json.loads(path.read_text())
    for categories, message in (
        ([*CATEGORIES, dict(id=8, name='elk')], 'need the same categories, but one lacks elk'),
        (CATEGORIES[::-1], 'but the order differs, which numbers them'),
    ):
        path.write_text(json.dumps(dict(coco, categories=categories)))
        with pytest.raises(ValueError, match=message):
            read_coco_folder('own')
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match='instances_val2017.json: is not JSON'):
        read_coco_folder('own')
    path.unlink()
    looked = r'annotations/instances_val\*.json, annotations/val\*.json, val\*/_annotations.coco.json'
    with pytest.raises(FileNotFoundError, match=f'own: no annotations for val; looked for {looked}'):
        read_coco_folder('own')
    for year in (2014, 2017):
        path.with_name(f'instances_val{year}.json').write_text('{}')
    with pytest.raises(ValueError, match='one annotation file is needed for val, found .*2014.json, .*2017.json'):
        read_coco_folder('own')
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder'):
        read_coco_folder('nowhere')


@pytest.mark.parametrize(
    'config, options, message',
    [
        ('mpvit-tiny_8xb128_in1k', {}, "got one with default_scope 'mmpretrain'"),
        ('mask-rcnn_plainvit-base-mae_lsj-100e_lvis-v1', {}, 'got one with LVISV1Dataset'),
        ('mask-rcnn_mpvit-tiny', {}, 'no such config'),
        (MINI, dict(epochs=0), 'epochs: at least 1, got 0'),
        (MINI, dict(batch_size=-1), 'batch size: at least 1, got -1'),
        (MINI, dict(out='mine.json'), 'mine.json: the new config ends in .py'),
        (
            str(get_config(MINI).filename),
            dict(out=get_config(MINI).filename, overwrite=True),
            'another file than the old',
        ),
    ],
)
def test_wrong_arguments(config, options, message, lay_out):
    with pytest.raises(ValueError, match=message):
        adapt_config(config, lay_out(), **{'out': 'mine.py', **options})


def test_tool(lay_out, tmp_path, monkeypatch, capsys):
    """Says in a line what is wrong, and leaves what is there."""

    def tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['adapt_config.py', *arguments, lay_out(), '--out', 'mine.py'])
        runpy.run_path(str(ROOT / 'tools' / 'adapt_config.py'), run_name='__main__')

    (tmp_path / 'mine.py').write_text('mine')
    for arguments, message in (
        ([MINI], 'mine.py: exists already and is not overwritten; --overwrite replaces it\n'),
        (['nothing', '--overwrite'], 'nothing: no such config'),
    ):
        with pytest.raises(SystemExit) as error:
            tool(*arguments)
        line = capsys.readouterr().err
        assert error.value.code == 1 and line.startswith(message) and line.count('\n') == 1
    assert (tmp_path / 'mine.py').read_text() == 'mine'
    tool(MINI, '--overwrite', '--epochs', '1')
    output = capsys.readouterr().out
    assert "classes   3: owl, big cat, dog's tail" in output and output.endswith('written   mine.py\n')
