"""Adapts a detector's config to your own images: adapt_config.py CONFIG FOLDER --out my_config.py.

FOLDER holds training and validation images, annotated in COCO's format and laid out as docs/own_data.md shows. The new
config holds every value of CONFIG, a file or a name of the model zoo: tools/train.py and `mim train mmdet` take it.
"""

import argparse
import json
import math
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmvitzoo import get_config
from mmvitzoo.checkpoints import convert, load
from mmvitzoo.zoo import name_types, type_name

# Relative to the folder, customary places first. `val*` also matches Roboflow's `valid`.
ANNOTATIONS = ('annotations/instances_{}*.json', 'annotations/{}*.json', '{}*/_annotations.coco.json')
IMAGES = ('{}*', 'images/{}*', 'images')
ODD_BOX = 'are not [left, top, width, height] in pixels inside their image'
NO_MASK = 'are left out, for their mask is neither RLE nor a polygon of three points'


def adapt_config(config, folder, out, checkpoint=None, epochs=None, batch_size=None, gpus=1, overwrite=False):
    """Writes the config and returns a report in lines; the arguments are those of the command."""
    cfg, folder, out = get_config(str(config)), Path(folder), Path(out)
    loader, base = cfg.train_dataloader, Path(cfg.filename)
    data = loader.dataset.get('dataset', loader.dataset)  # inside of RepeatDataset
    if type_name(data.type) != 'CocoDataset':
        raise ValueError(f'{config}: only MMDetection configs with CocoDataset are supported, got one with {data.type}')
    if out.suffix != '.py' or (out.exists() and not overwrite):
        raise FileExistsError(f'{out}: must end in .py and not exist yet; --overwrite replaces a file')
    if any(number is not None and number < 1 for number in (epochs, batch_size, gpus)):
        raise ValueError(f'epochs, batch size and gpus must be at least 1, got {epochs}, {batch_size} and {gpus}')
    train, val = splits = [read_split(folder, name) for name in ('train', 'val')]
    if train.classes != val.classes:
        differing = sorted({*train.classes} ^ {*val.classes}) or 'their order'
        raise ValueError(f'{folder}: train and val need the same categories, but differ in {differing}')
    has_mask = [bool(ann.get('segmentation')) for split in splits for ann in split.annotations]
    if 'segm' in cfg.val_evaluator.metric and not any(has_mask) and 'mask_head' in cfg.model.get('roi_head', {}):
        for name in ('mask_head', 'mask_roi_extractor'):
            cfg.model.roi_head[name] = None
        cfg.val_evaluator.metric = 'bbox'
        train.notes.append('has no masks: the detector is trained without its mask head')
    elif 'segm' in cfg.val_evaluator.metric and not all(has_mask):
        lacking = f'which {has_mask.count(False)} of {len(has_mask)} annotations lack'
        raise ValueError(f'{base.stem} predicts masks, {lacking}; remove all masks to train on boxes alone')
    init_default_scope('mmdet')
    backbone = cfg.model.backbone.get('module', cfg.model.backbone)  # LoRABackbone has the config of its module
    start = (backbone.get('init_cfg') or {}).get('checkpoint')
    if checkpoint:
        init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
        MODELS.build(dict(backbone, init_cfg=init_cfg)).init_weights()  # raises if it does not fit
        found = convert(load(checkpoint))
        is_detector = any(key.startswith(('rpn_head.', 'bbox_head.')) for key in found.state_dict)
        if is_detector and found.source != 'mmvitzoo':
            raise ValueError(f'{checkpoint}: a {found.source} detector; tools/model_converters/convert.py converts it')
        backbone.init_cfg, cfg.load_from = (None, str(checkpoint)) if is_detector else (init_cfg, None)
    elif start and '://' not in start and not Path(start).is_file():
        train.notes.append(f'lacks {start}: see {base.parent}/README.md, or set init_cfg=None of the backbone')
    set_num_classes(cfg.model, len(train.classes))
    base_batch_size = cfg.get('auto_scale_lr', {}).get('base_batch_size', loader.batch_size)
    loader.batch_size = batch_size or loader.batch_size
    total_batch_size = loader.batch_size * gpus
    # The learning rate is proportional to the images in a step (https://arxiv.org/abs/1706.02677).
    lr = float(f'{cfg.optim_wrapper.optimizer.lr * total_batch_size / base_batch_size:.6g}')
    cfg.optim_wrapper.optimizer.lr = lr
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=total_batch_size)
    cfg.val_evaluator.ann_file = (folder / val.file).as_posix()
    colors = dict(palette='random') if len(train.classes) > 80 else {}  # CocoDataset has a palette of 80
    for dataset, split in ((data, train), (cfg.val_dataloader.dataset, val)):
        dataset.metainfo = dict(classes=split.classes, **colors)
        dataset.update(data_root=f'{folder.as_posix()}/', ann_file=split.file, data_prefix=dict(img=split.img_dir))
        for step in [step for step in dataset.pipeline if 'with_mask' in step]:
            step.with_mask = 'segm' in cfg.val_evaluator.metric  # a broken mask does not cost a box
        count_kept(dataset, split)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    if epochs and 'times' in loader.dataset:
        loader.dataset.times = 1
    iterations = math.ceil(train.num_images * loader.dataset.get('times', 1) / total_batch_size)
    if epochs:
        set_schedule(cfg, epochs, iterations)
    epochs = epochs or cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters / iterations
    for name in ('data_root', 'metainfo', 'max_epochs', 'max_iters'):  # variables of the base files
        cfg.pop(name, None)
    name_types(cfg._cfg_dict)
    out.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(out.with_name(f'.{out.name}'))
    out.with_name(f'.{out.name}').replace(out)
    return [
        f'classes   {len(train.classes)}: {", ".join(train.classes)}',
        *(f'{x.name:10}{x.num_images} images in {x.img_dir}, {x.num_boxes} boxes in {x.file}' for x in splits),
        f'training  {epochs:.3g} epochs, {epochs * iterations:.0f} iterations of {total_batch_size} images, lr {lr:g}',
        *(f'note      {note}' for split in splits for note in split.notes),
    ]


def read_split(root, name):
    """Finds the annotations and the images of a split and checks that they belong together."""
    patterns = [pattern.format(name) for pattern in ANNOTATIONS]
    files = next(filter(None, (sorted(root.glob(pattern)) for pattern in patterns)), [])
    if len(files) != 1:
        raise ValueError(f'{root}: {name} needs one file of {patterns}, found {[str(file) for file in files]}')
    try:
        coco = json.loads(files[0].read_bytes())
        classes, images = [x['name'] for x in coco['categories']], [Path(x['file_name']) for x in coco['images']]
        ids = {kind: Counter(x['id'] for x in coco[kind]) for kind in ('categories', 'images', 'annotations')}
        faults = [f'{count} {kind} have the id {i}' for kind in ids for i, count in ids[kind].items() if count > 1]
        faults += [f'the category name {x!r} is not text' for x in classes if not isinstance(x, str)]
        for x in coco['annotations']:
            if 'iscrowd' not in x:
                faults.append(f'annotation {x["id"]} lacks iscrowd, 0 or 1')
            elif not (ids['images'][x['image_id']] and ids['categories'][x['category_id']] and x['iscrowd'] in (0, 1)):
                faults.append(f'annotation {x["id"]} needs a known image_id and category_id, and iscrowd 0 or 1')
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{files[0]}: not in COCO's format: {type(error).__name__}: {error}") from None
    if faults:
        raise ValueError(f'{files[0]}: {faults[0]}')
    folders = [x for pattern in IMAGES for x in sorted(root.glob(pattern.format(name))) if x.is_dir()] + [root]
    missing = {path: [x for x in images if not (path / x).is_file()] for path in folders}
    best, absent = min(missing.items(), key=lambda item: len(item[1]))
    if absent:
        lacking = f'{len(absent)} of {len(images)} images are missing, such as {absent[0]}'
        raise FileNotFoundError(f'{files[0]}: {lacking}; looked in {", ".join(map(str, folders))}')
    paths = dict(file=files[0].relative_to(root).as_posix(), img_dir=f'{best.relative_to(root).as_posix()}/')
    return argparse.Namespace(name=name, classes=classes, annotations=coco['annotations'], notes=[], **paths)


def count_kept(dataset, split):
    """Counts the images and boxes that MMDetection keeps, and notes what it leaves out."""
    in_image, labels, counts = Counter(ann['image_id'] for ann in split.annotations), Counter(), Counter()
    steps = [step for step in dataset.pipeline if type_name(step.type).endswith('LoadAnnotations')]
    try:
        with redirect_stdout(None):  # pycocotools reports its progress
            kept = DATASETS.build(dict(dataset, pipeline=steps, serialize_data=False))
        for info in map(kept.get_data_info, range(len(kept))):
            h, w, boxes = info['height'], info['width'], [x['bbox'] for x in info['instances']]
            odd = [box for box in boxes if min(box) < -1 or box[2] > w + 1 or box[3] > h + 1]  # some count from 1
            crowds = sum(x['ignore_flag'] for x in info['instances'])
            ignored = kept.pipeline(dict(info, ori_shape=(h, w)))['gt_ignore_flags']
            labels.update(x['bbox_label'] for x, ignore in zip(info['instances'], ignored) if not ignore)
            counts[ODD_BOX] += in_image.pop(info['img_id'], 0) - len(boxes) + len(odd)
            counts['are left out, as iscrowd says'] += crowds
            counts[NO_MASK] += int(ignored.sum()) - crowds
    except Exception as error:  # pycocotools and MMDetection raise many kinds
        raise ValueError(f'{dataset.data_root}{split.file}: MMDetection cannot read it: {error!r}') from None
    counts['are left out, in images below min_size of filter_cfg'] = sum(in_image.values())
    notes = [f'{count} of {len(split.annotations)} boxes {reason}' for reason, count in counts.items() if count]
    # Evaluation fails at a mask that pycocotools cannot read. Many odd boxes mean that the numbers are something else.
    if not labels or (kept.test_mode and counts[NO_MASK]) or 10 * counts[ODD_BOX] > len(split.annotations):
        raise ValueError(f'{dataset.data_root}{split.file}: {"; ".join(notes) or "no boxes"}')
    if kept.test_mode and any(ann['id'] == 0 for ann in split.annotations):
        notes.append('annotation 0 counts as never found: pycocotools takes 0 for none')
    unseen = [name for label, name in enumerate(split.classes) if not labels[label]]
    notes += [f'no box of {", ".join(unseen)}'] if unseen else []
    split.notes += [f'{split.file}: {note}' for note in notes]
    split.num_images, split.num_boxes = len(kept), sum(labels.values())


def set_num_classes(part, number):
    """Sets every `num_classes` in a part of a config."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if key == 'num_classes':
            part[key] = number
        elif isinstance(value, (dict, list)):
            set_num_classes(value, number)


def set_schedule(cfg, epochs, iterations):
    """Scales the schedule to a number of epochs; a warm-up keeps its length, but takes at most a tenth."""
    unit = 'max_epochs' if 'max_epochs' in cfg.train_cfg else 'max_iters'
    lengths = dict(max_epochs=epochs, max_iters=epochs * iterations)
    factor = lengths[unit] / cfg.train_cfg[unit]

    def scale(time):
        return [scale(x) for x in time] if isinstance(time, list) else time and max(1, round(time * factor))

    for scheduler in cfg.param_scheduler:
        if type_name(scheduler.type) == 'LinearLR':  # a warm-up, which needs two steps to end
            length = lengths['max_epochs' if scheduler.get('by_epoch', True) else 'max_iters']
            scheduler.end = min(scheduler.end, max(2, length // 10))
        else:
            for key in scheduler.keys() & {'begin', 'end', 'T_max', 'milestones'}:
                scheduler[key] = scale(scheduler[key])
    cfg.train_cfg.update({unit: lengths[unit], 'val_interval': scale(cfg.train_cfg.val_interval)})
    cfg.default_hooks.checkpoint.interval = scale(cfg.default_hooks.checkpoint.interval)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('folder', help='your images and annotations')
    parser.add_argument('--out', required=True, help='config to write')
    parser.add_argument('--checkpoint', help='weights of a backbone or detector to start from; default: as in CONFIG')
    parser.add_argument('--epochs', type=int, help='length of the training; default: as in CONFIG')
    parser.add_argument('--batch-size', type=int, help='batch size of one GPU; default: as in CONFIG')
    parser.add_argument('--gpus', type=int, default=1, help='number of GPUs of the training; default: 1')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if there is one')
    args = parser.parse_args()
    try:
        print(*adapt_config(**vars(args)), f'written   {args.out}', sep='\n')
    except (OSError, ValueError) as error:
        parser.exit(1, f'{error}\n')


if __name__ == '__main__':
    main()
