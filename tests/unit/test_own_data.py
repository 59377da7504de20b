"""tools/adapt_config.py: checks of a folder in COCO's format, and the config that trains on it."""

import importlib.util
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmvitzoo import get_config
from mmvitzoo.checkpoints import export

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location('adapt_config', ROOT / 'tools' / 'adapt_config.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
adapt_config = tool.adapt_config
# The ids have gaps and are not sorted; labels follow the order of the file.
CATEGORIES = [dict(id=7, name='owl'), dict(id=3, name='big cat'), dict(id=20, name="dog's tail")]
CLASSES = ['owl', 'big cat', "dog's tail"]
MINI = 'retinanet_scalablevit-mini_fpn_mini-coco'
MASKS = 'mask-rcnn_mpvit-tiny_fpn_1x_coco'


@pytest.fixture(scope='session')
def annotations(workspace):
    """Annotations of four images of each split of the demonstration data, in three classes."""
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
    """A function that writes a folder `own` into the working directory, with changed annotations."""
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


def in_annotations(number=None, **values):
    """Returns a function that changes the first annotations."""

    def change(coco):
        for ann in coco['annotations'][:number]:
            ann.update(values)

    return change


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
    """Every head has the number of classes; the data sets have the images and the labels of the folder."""
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


def test_only_data_classes_and_learning_rate_differ(lay_out, tmp_path):
    adapt_config(MASKS, lay_out(), 'mine.py')
    assert '_base_' not in Path('mine.py').read_text() and list(tmp_path.glob('.*')) == []
    base, mine = get_config(MASKS), Config.fromfile('mine.py')
    loaders, evaluators = ({f'{split}_{kind}' for split in ('val', 'test')} for kind in ('dataloader', 'evaluator'))
    changed = {'model', 'train_dataloader', *loaders, *evaluators, 'optim_wrapper', 'auto_scale_lr'}
    assert {key for key in mine if mine[key] != base.get(key)} == changed
    assert set(base) - set(mine) == {'data_root'}  # a variable of the base files, whose value no longer holds
    assert mine.train_dataloader.dataset.pipeline == base.train_dataloader.dataset.pipeline
    assert mine.model.backbone == base.model.backbone and mine.custom_imports == base.custom_imports


def test_class_names_of_any_text(lay_out):
    names = ["dog's tail", 'h\u00e9risson', 'a "b" \\n {{c}}']

    def change(coco):
        coco['categories'] = [dict(id=x['id'], name=name) for x, name in zip(CATEGORIES, names)]

    adapt_config(MINI, lay_out(change=change), 'mine.py')
    assert list(Config.fromfile('mine.py').train_dataloader.dataset.metainfo.classes) == names


@pytest.mark.parametrize(
    'name, options, lr, base_batch_size',
    [
        (MASKS, dict(batch_size=4), 1e-4 * 4 / 16, 4),
        ('deformable-detr_mpvit-small_16xb2-50e_coco', dict(batch_size=1), 2e-4 / 32, 1),
        (MINI, dict(batch_size=6), 15e-4, 6),  # made for one process
        (MASKS, dict(batch_size=4, gpus=2), 1e-4 * 8 / 16, 8),
    ],
)
def test_learning_rate(name, options, lr, base_batch_size, lay_out):
    adapt_config(name, lay_out(), 'mine.py', **options)
    config = Config.fromfile('mine.py')
    assert config.optim_wrapper.optimizer.lr == pytest.approx(lr)
    assert config.train_dataloader.batch_size == options['batch_size']
    assert config.auto_scale_lr.base_batch_size == base_batch_size
    assert config.auto_scale_lr.enable is False


def test_epochs_of_a_training_by_iterations(lay_out):
    """Images without boxes are filtered: 18 of 20 images are left, 9 iterations an epoch."""

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
    assert 'training  30 epochs, 270 iterations of 2 images, lr 1.25e-05' in report


def test_epochs_of_a_training_by_epochs(lay_out):
    folder = lay_out()
    adapt_config('retinanet_scalablevit-small_fpn_ms-3x_coco', folder, 'mine.py', epochs=12, batch_size=1)
    config = Config.fromfile('mine.py')
    assert (config.train_cfg.max_epochs, config.train_cfg.val_interval) == (12, 1)
    warm_up, steps = config.param_scheduler
    assert warm_up.end == 4 and steps.milestones == [9, 11] and steps.end == 12
    assert config.default_hooks.checkpoint.interval == 1

    # The shortest warm-up that reaches the full learning rate has two iterations.
    adapt_config(MINI, folder, 'short.py', epochs=1, batch_size=1)
    warm_up = Config.fromfile('short.py').param_scheduler[0]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    scheduler = PARAM_SCHEDULERS.build(dict(warm_up, optimizer=optimizer))
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert warm_up.end == 2 and optimizer.param_groups[0]['lr'] == pytest.approx(1)

    adapt_config(MINI, folder, 'mini.py', epochs=1000)  # a tenth is longer than the base's warm-up
    config = Config.fromfile('mini.py')
    warm_up, cosine = config.param_scheduler
    assert (config.train_cfg.val_interval, warm_up.end, cosine.T_max) == (500, 50, 1000)

    # The base counts four passes over the data as an epoch; --epochs counts one.
    (line,) = [x for x in adapt_config('mask-rcnn_vitae-small_lsj-100e_coco', folder, 'a.py') if 'training' in x]
    assert line.startswith('training  25 epochs, 50 iterations of 8 images, lr ')
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
    train, val = (tool.read_split(Path(lay_out(**layout)), name) for name in ('train', 'val'))
    assert (val.file, val.img_dir) == (ann_file, img_dir)
    assert train.img_dir == img_dir.replace('valid', 'train').replace('val', 'train')
    assert train.classes == CLASSES and len(train.annotations) > 4


@pytest.mark.parametrize('images', ['images', '.'])
def test_file_names_with_the_folder_of_the_split(images, lay_out):
    def change(coco):
        for image in coco['images']:
            image['file_name'] = f'train2017/{image["file_name"]}'

    lay_out(images=f'{images}/train2017', change=change)
    assert tool.read_split(Path('own'), 'val').img_dir == f'{images}/'


def test_boxes_without_masks(lay_out):
    """Masks of a part are refused; without any, the mask head goes. A box config loads no masks."""
    folder = lay_out(change=in_annotations(2, segmentation=[]))
    with pytest.raises(ValueError, match=f'{MASKS} predicts masks, which 4 of .* annotations lack; remove all masks'):
        adapt_config(MASKS, folder, 'mine.py')
    lay_out(change=in_annotations(segmentation=[]))
    report = adapt_config('cascade-mask-rcnn_mpvit-small_fpn_ms-3x_coco', folder, 'boxes.py')
    assert 'note      has no masks: the detector is trained without its mask head' in report
    config = Config.fromfile('boxes.py')
    init_default_scope('mmdet')
    with torch.device('meta'):
        assert MODELS.build(config.model).roi_head.with_mask is False
    assert config.test_evaluator.metric == 'bbox'
    assert 'masks' not in DATASETS.build(config.train_dataloader.dataset)[0]['data_samples'].gt_instances
    adapt_config(MINI, folder, 'mine.py')
    config = Config.fromfile('mine.py')
    init_default_scope('mmdet')
    for loader in (config.train_dataloader, config.val_dataloader):
        sample = DATASETS.build(loader.dataset)[0]['data_samples']
        assert len(sample.gt_instances.bboxes) > 1 and 'masks' not in sample.gt_instances


def test_box_config_ignores_broken_masks(lay_out, annotations):
    report = adapt_config(MINI, lay_out(change=in_annotations(segmentation=[[]])), 'mine.py')
    boxes = len(annotations['train']['annotations'])
    assert f'train     4 images in train2017/, {boxes} boxes in annotations/instances_train2017.json' in report


def test_checkpoints(lay_out, tmp_path):
    """A backbone replaces the base's init_cfg; a whole detector is loaded by the runner."""
    folder = lay_out()
    backbone = MODELS.build(dict(type='MPViT', arch='tiny')).state_dict()
    torch.save(backbone, 'backbone.pth')
    report = adapt_config(MASKS, folder, 'mine.py')
    assert not any('note' in line for line in report)  # the config names an address
    report = adapt_config('mask-rcnn_scalablevit-small_fpn_1x_coco', folder, 'mine.py', overwrite=True)
    (note,) = [line for line in report if line.startswith('note')]
    readme = '.*/configs/scalablevit/README.md, or set .*init_cfg=None'
    assert re.search(f'lacks checkpoints/scalablevit_small.pth: see {readme}', note)
    for name in (MASKS, 'mask-rcnn_mpvit-tiny_fpn_mini-coco'):  # the latter has another kind of init_cfg
        report = adapt_config(name, folder, 'mine.py', checkpoint='backbone.pth', overwrite=True)
        config = Config.fromfile('mine.py')
        assert config.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='backbone.pth')
        assert config.load_from is None and not any('note' in line for line in report)

    detector = {**{f'backbone.{key}': x for key, x in backbone.items()}, 'rpn_head.rpn_cls.bias': torch.zeros(3)}
    torch.save({'state_dict': detector}, 'detector.pth')
    adapt_config(MASKS, folder, 'mine.py', checkpoint='detector.pth', overwrite=True)
    config = Config.fromfile('mine.py')
    assert config.model.backbone.init_cfg is None and config.load_from == 'detector.pth'

    # The runner does not convert, so that a detector of another layout is refused.
    theirs = export({key: x for key, x in detector.items() if key.startswith('backbone.')}, 'mpvit', 'detectron2')
    rpn = dict.fromkeys(('weight', 'bias'), torch.zeros(3))
    theirs.update({f'proposal_generator.rpn_head.objectness_logits.{leaf}': x for leaf, x in rpn.items()})
    torch.save({'model': theirs}, 'detectron2.pth')
    for checkpoint, message in (
        ('detectron2.pth', 'a detectron2 detector; tools/model_converters/convert.py converts it'),
        ('nowhere.pth', 'nowhere.pth: no such checkpoint'),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            adapt_config(MASKS, folder, 'other.py', checkpoint=checkpoint)
    assert not (tmp_path / 'other.py').exists()


def test_more_classes_than_the_palette_of_coco(lay_out):
    from mmdet.visualization import get_palette

    def change(coco):
        coco['categories'] = [*CATEGORIES, *(dict(id=100 + i, name=f'class {i}') for i in range(90))]

    report = adapt_config(MINI, lay_out(change=change), 'mine.py')
    assert sum('no box of class 0, class 1' in line for line in report) == 2  # in train and in val
    init_default_scope('mmdet')
    dataset = DATASETS.build(Config.fromfile('mine.py').val_dataloader.dataset)
    assert len(get_palette(dataset.metainfo['palette'], 93)) == len(dataset.metainfo['classes']) == 93


def small_images(coco):
    for image in coco['images']:
        image.update(height=24, width=24)
    in_annotations(bbox=[1, 1, 9, 9], segmentation=[[1, 1, 9, 1, 9, 9]])(coco)


def corners(coco):
    for ann in coco['annotations']:
        x, y, w, h = ann['bbox']
        ann['bbox'] = [x, y, x + w, y + h]


ODD = r'boxes are not \[left, top, width, height\] in pixels inside their image'
NO_MASK = 'boxes are left out, for their mask is neither RLE nor a polygon of three points'


@pytest.mark.parametrize(
    'change, message',
    [
        (in_annotations(iscrowd=1), r'(\d+) of \1 boxes are left out, as iscrowd says$'),
        (in_annotations(segmentation=[[]]), rf'(\d+) of \1 {NO_MASK}$'),
        (in_annotations(segmentation=[[5, 5, 9, 9]]), rf'(\d+) of \1 {NO_MASK}$'),
        (in_annotations(segmentation=dict(size=[160, 192])), rf'(\d+) of \1 {NO_MASK}$'),
        (small_images, r'(\d+) of \1 boxes are left out, in images below min_size of filter_cfg$'),
        (in_annotations(area=0), rf'(\d+) of \1 {ODD}$'),
        (in_annotations(bbox=[0.1, 0.1, 0.4, 0.4]), rf'(\d+) of \1 {ODD}$'),
        (in_annotations(bbox=[500, 500, 9, 9]), rf'(\d+) of \1 {ODD}$'),
        (corners, rf'[0-9]+ of [0-9]+ {ODD}$'),
    ],
    ids=['crowds', 'empty', 'two points', 'no counts', 'small images', 'no area', 'normalized', 'outside', 'corners'],
)
def test_data_from_which_nothing_can_be_learnt(change, message, lay_out):
    with pytest.raises(ValueError, match=f'own/annotations/instances_train2017.json: {message}'):
        adapt_config(MASKS, lay_out(change=change), 'mine.py')
    assert not Path('mine.py').exists()


@pytest.mark.parametrize(
    'config, change, message',
    [
        (MASKS, in_annotations(5, iscrowd=1), '5 of {} boxes are left out, as iscrowd says'),
        (MASKS, in_annotations(5, segmentation=[[5, 5, 9, 9]]), f'5 of {{}} {NO_MASK}'),
        (MINI, in_annotations(1, bbox=[5, 5, 500, 500]), f'1 of {{}} {ODD}'),
        (MINI, in_annotations(1, bbox=[5, 5, 9, float('nan')]), f'1 of {{}} {ODD}'),
    ],
    ids=['crowds', 'two points', 'outside', 'NaN'],
)
def test_partly_unusable_data_is_noted(config, change, message, lay_out, annotations, tmp_path):
    """The numbers in the report are those of the training samples."""
    lay_out(change=change)
    path = tmp_path / 'own' / 'annotations' / 'instances_val2017.json'
    path.write_text(json.dumps(annotations['val']))
    report = adapt_config(config, 'own', 'mine.py')
    message = message.format(len(annotations['train']['annotations']))
    pattern = f'note      annotations/instances_train2017.json: {message}$'
    assert sum(bool(re.match(pattern, line)) for line in report) == 1
    init_default_scope('mmdet')
    dataset = DATASETS.build(Config.fromfile('mine.py').train_dataloader.dataset)
    boxes = sum(len(dataset[i]['data_samples'].gt_instances) for i in range(len(dataset)))
    assert f'train     4 images in train2017/, {boxes} boxes in annotations/instances_train2017.json' in report


def test_masks_that_fail_in_the_evaluation_are_refused(lay_out, annotations, tmp_path):
    """pycocotools raises for them after the first epoch of a training."""
    lay_out(change=in_annotations(1, segmentation=[[]]))
    path = tmp_path / 'own' / 'annotations' / 'instances_train2017.json'
    path.write_text(json.dumps(annotations['train']))
    with pytest.raises(ValueError, match=f'instances_val2017.json: 1 of [0-9]+ {NO_MASK}'):
        adapt_config(MASKS, 'own', 'mine.py')
    truth = COCO('own/annotations/instances_val2017.json')
    with pytest.raises(Exception, match='input type is not supported'):
        truth.annToRLE(truth.dataset['annotations'][0])


def test_id_zero(lay_out):
    """The note is right: perfect detections score one, unless an annotation has the id 0."""
    scores = []
    for first in (1, 0):

        def number(coco, first=first):
            for i, ann in enumerate(coco['annotations'], first):
                ann['id'] = i

        report = adapt_config(MINI, lay_out(change=number), 'mine.py', overwrite=True)
        notes = [line for line in report if 'annotation 0 counts as never found' in line]
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


NOT_COCO = "not in COCO's format: "


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda coco: coco.pop('categories'), f"{NOT_COCO}KeyError: 'categories'"),
        (lambda coco: coco.update(images=[1]), f'{NOT_COCO}TypeError: '),
        (drop('annotations', 'iscrowd'), 'annotation 2 lacks iscrowd, 0 or 1'),
        (drop('images', 'file_name'), f"{NOT_COCO}KeyError: 'file_name'"),
        (set_in('images', file_name=5), f'{NOT_COCO}TypeError: '),
        (set_in('categories', name=5), 'the category name 5 is not text'),
        (set_in('categories', id=7), '2 categories have the id 7'),
        (set_in('images', id=1), '2 images have the id 1'),
        (set_in('annotations', id=1), '2 annotations have the id 1'),
        (set_in('annotations', image_id=99), 'annotation 2 needs a known image_id and category_id, and iscrowd 0 or 1'),
        (set_in('annotations', category_id=1), 'annotation 2 needs a known image_id and category_id'),
        (set_in('annotations', iscrowd='no'), 'annotation 2 needs .* iscrowd 0 or 1'),
        (set_in('images', file_name='x.jpg'), '1 of 4 images are missing, such as x.jpg; looked in own/train2017, own'),
    ],
)
def test_broken_annotations(change, message, lay_out):
    file = 'own/annotations/instances_train2017.json'
    with pytest.raises((ValueError, FileNotFoundError), match=f'^{file}: {message}') as error:
        tool.read_split(Path(lay_out(change=change)), 'train')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda coco: coco.update(annotations=[]), 'no boxes'),
        (drop('images', 'height'), "MMDetection cannot read it: KeyError\\('height'\\)"),
        (drop('annotations', 'area'), "MMDetection cannot read it: KeyError\\('area'\\)"),
        (set_in('annotations', bbox=[1, 2, 3]), 'MMDetection cannot read it: ValueError'),
        (set_in('annotations', bbox=['1', '2', '3', '4']), 'MMDetection cannot read it: TypeError'),
        (set_in('annotations', segmentation=dict(size=[9, 9], counts='')), 'MMDetection cannot read it: '),
    ],
)
def test_annotations_that_mmdetection_cannot_read(change, message, lay_out):
    file = 'own/annotations/instances_train2017.json'
    with pytest.raises(ValueError, match=f'^{file}: {message}') as error:
        adapt_config(MASKS, lay_out(change=change), 'mine.py')
    assert '\n' not in str(error.value)


def test_splits_that_do_not_belong_together(lay_out, tmp_path):
    lay_out()
    path = tmp_path / 'own' / 'annotations' / 'instances_val2017.json'
    coco = json.loads(path.read_text())
    for categories, message in (
        ([*CATEGORIES, dict(id=8, name='elk')], r"need the same categories, but differ in \['elk'\]"),
        (CATEGORIES[::-1], 'need the same categories, but differ in their order'),
    ):
        path.write_text(json.dumps(dict(coco, categories=categories)))
        with pytest.raises(ValueError, match=message):
            adapt_config(MINI, 'own', 'mine.py')
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match=f'instances_val2017.json: {NOT_COCO}JSONDecodeError: '):
        adapt_config(MINI, 'own', 'mine.py')
    path.unlink()
    patterns = r"'annotations/instances_val\*.json', 'annotations/val\*.json', 'val\*/_annotations.coco.json'"
    with pytest.raises(ValueError, match=rf'own: val needs one file of \[{patterns}\], found \[\]'):
        adapt_config(MINI, 'own', 'mine.py')
    for year in (2014, 2017):
        path.with_name(f'instances_val{year}.json').write_text('{}')
    with pytest.raises(ValueError, match=r"own: val needs one file of .*, found \[.*2014.json', .*2017.json'\]"):
        adapt_config(MINI, 'own', 'mine.py')
    with pytest.raises(ValueError, match='nowhere: train needs one file'):
        adapt_config(MINI, 'nowhere', 'mine.py')


@pytest.mark.parametrize(
    'config, options, message',
    [
        ('mpvit-tiny_8xb128_in1k', {}, 'only MMDetection configs with CocoDataset .*, got one with ImageNet'),
        ('mask-rcnn_plainvit-base-mae_lsj-100e_lvis-v1', {}, 'got one with LVISV1Dataset'),
        ('mask-rcnn_mpvit-tiny', {}, 'no such config'),
        (MINI, dict(epochs=0), 'epochs, batch size and gpus must be at least 1, got 0, None and 1'),
        (MINI, dict(batch_size=-1), 'epochs, batch size and gpus must be at least 1, got None, -1 and 1'),
        (MINI, dict(out='mine.json'), 'mine.json: must end in .py'),
    ],
)
def test_wrong_arguments(config, options, message, lay_out):
    with pytest.raises((ValueError, OSError), match=message):
        adapt_config(config, lay_out(), **{'out': 'mine.py', **options})


def test_command(lay_out, tmp_path, monkeypatch, capsys):
    """Errors are one line, and an existing file is left alone without --overwrite."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['adapt_config.py', *arguments, lay_out(), '--out', 'mine.py'])
        tool.main()

    (tmp_path / 'mine.py').write_text('mine')
    for arguments, message in (
        ([MINI], 'mine.py: must end in .py and not exist yet; --overwrite replaces a file\n'),
        (['nothing', '--overwrite'], 'nothing: no such config'),
    ):
        with pytest.raises(SystemExit) as error:
            run(*arguments)
        line = capsys.readouterr().err
        assert error.value.code == 1 and line.startswith(message) and line.count('\n') == 1
    assert (tmp_path / 'mine.py').read_text() == 'mine'
    run(MINI, '--overwrite', '--epochs', '1')
    output = capsys.readouterr().out
    assert output.startswith("classes   3: owl, big cat, dog's tail\n") and output.endswith('written   mine.py\n')


def test_failed_write_leaves_the_old_config(lay_out, monkeypatch):
    def dump(cfg, file):
        Path(file).write_text('half')
        raise OSError('no space left')

    folder = lay_out()
    Path('mine.py').write_text('old')
    monkeypatch.setattr(Config, 'dump', dump)
    with pytest.raises(OSError, match='no space left'):
        adapt_config(MINI, folder, 'mine.py', overwrite=True)
    assert Path('mine.py').read_text() == 'old'


def test_predictions_have_the_class_names_of_the_config(lay_out, tmp_path, monkeypatch):
    """Labels follow the order of the classes in the file, not that of their ids."""
    adapt_config(MINI, lay_out(), 'mine.py')
    found = InstanceData(labels=torch.tensor([0]), scores=torch.tensor([0.9]), bboxes=torch.tensor([[5, 5, 30, 30]]))
    monkeypatch.setattr('mmvitzoo.inference.load_model', lambda *args: torch.nn.Identity())
    monkeypatch.setattr('mmdet.apis.inference_detector', lambda *args: SimpleNamespace(pred_instances=found))
    texts = []
    monkeypatch.setattr(Axes, 'text', lambda self, x, y, text, **kwargs: texts.append(text))
    monkeypatch.setattr(sys, 'argv', ['predictions.py', 'mine.py', 'none.pth', '--out', 'p.png', '--num-images', '2'])
    runpy.run_path(str(ROOT / 'tools/visualization/predictions.py'), run_name='__main__')
    assert texts.count('owl 0.90') == 2 and set(texts) <= {'owl 0.90', *CLASSES}
