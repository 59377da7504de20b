"""From a folder of your own images, annotated in COCO's format, to a config that trains on them."""

import json
import math
import os
import reprlib
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from mmengine.config import ConfigDict

from ..checkpoints import convert, load, load_pretrained
from ..registry import MODELS
from ..zoo import get_config, list_models

# Where a split lies below the folder, the customary places first. `val*` is Roboflow's `valid`, too.
ANNOTATIONS = ('annotations/instances_{split}*.json', 'annotations/{split}*.json', '{split}*/_annotations.coco.json')
IMAGES = ('{split}*', 'images/{split}*', 'images')
# What MMDetection and pycocotools read, and as what.
NUMBER = (int, float)
REQUIRED = dict(
    categories=dict(id=int, name=str),
    images=dict(id=int, file_name=str, height=NUMBER, width=NUMBER),
    annotations=dict(id=int, image_id=int, category_id=int, bbox=list, area=NUMBER, iscrowd=int),
)
MAX_ODD_BOXES = 0.1  # of all; if there are more, the numbers mean something else
COCO_COLOURS = 80  # of MMDetection's CocoDataset, which cannot draw more classes than that


@dataclass
class Split:
    """The training or the validation part of a folder.

    Attributes:
        ann_file: Annotation file, below the folder.
        img_dir: Folder of the images, below the folder, with a slash at its end.
        classes: In the order of the file, by which MMDetection numbers them.
        boxes: Number of boxes of every class.
        num_masks: Boxes that have a mask.
        num_images: Images, with boxes or without.
        num_annotated: Images with boxes.
        notes: What is odd, but does not prevent a training.
    """

    ann_file: str
    img_dir: str
    classes: List[str]
    boxes: List[int]
    num_masks: int
    num_images: int
    num_annotated: int
    notes: List[str]

    def __str__(self) -> str:
        return (
            f'{self.num_images} images in {self.img_dir}, {sum(self.boxes)} boxes and {self.num_masks} masks '
            f'in {self.ann_file}'
        )


def adapt_config(
    config: Union[str, Path],
    folder: Union[str, Path],
    out: Union[str, Path],
    checkpoint: Optional[str] = None,
    epochs: Optional[int] = None,
    batch_size: Optional[int] = None,
    overwrite: bool = False,
) -> List[str]:
    """Writes a config that inherits from one of MMDetection and trains on the images of a folder.

    Only what the folder needs differs: the data, the number of classes, and the learning rate, which shrinks
    with the images in a step (https://arxiv.org/abs/1706.02677).

    Args:
        config: Path, or name in the model zoo, of a detector's config for COCO or the demonstration data.
        folder: See :func:`read_coco_folder`. The new config names it as it is given here.
        out: File to write, ``.py``.
        checkpoint: What to start from: weights of the backbone in any known layout, or a whole detector in
            ours, of which all is taken that does not depend on the classes. None starts as the config does.
        epochs: Length of the training. Steps of the learning rate and evaluations move with it; a warm-up
            keeps its length, but takes at most a tenth. None leaves the schedule as it is.
        batch_size: Images in a step of the one process. None leaves the config's.
        overwrite: Replace the file if there is one.

    Returns:
        Lines that tell the user what was found and what to know before the training.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is false.
        FileNotFoundError: There is no such folder or checkpoint, or annotations or images are missing.
        ValueError: The config, the annotations, the checkpoint or a number cannot be used, and why.
        OSError: The file cannot be written.
    """
    out = Path(out)
    base = get_config(str(config))
    path = Path(base.filename).resolve()
    scope = base.get('default_scope')
    kind = _innermost(base.train_dataloader.dataset).type if scope == 'mmdet' else f'default_scope {scope!r}'
    if kind != 'CocoDataset':
        raise ValueError(f'{config}: adapted are detectors of MMDetection with CocoDataset, got one with {kind}')
    if out.suffix != '.py' or out.resolve() == path:
        raise ValueError(f'{out}: the new config ends in .py and is another file than the old one')
    if out.exists() and not overwrite:
        raise FileExistsError(f'{out}: exists already and is not overwritten')
    for name, number in (('epochs', epochs), ('batch size', batch_size)):
        if number is not None and number < 1:
            raise ValueError(f'{name}: at least 1, got {number}')
    train, val = read_coco_folder(folder)
    _check_masks(base.model, path.stem, train, val)

    own_batch_size = base.train_dataloader.batch_size
    batch_size = batch_size or own_batch_size
    base_batch_size = base.get('auto_scale_lr', {}).get('base_batch_size', own_batch_size)
    lr = base.optim_wrapper.optimizer.lr
    iterations = _iterations(base.train_dataloader.dataset, train, batch_size, epochs)
    train_data, val_data = (
        _data(base[f'{name}_dataloader'].dataset, f'_base_.{name}_dataloader.dataset', split, epochs)
        for name, split in (('train', train), ('val', val))
    )
    sections = [
        (
            f'{path.stem} for the images in {folder}; written by tools/adapt_config.py.',
            dict(_base_=repr(Path(os.path.relpath(path, out.resolve().parent)).as_posix())),
        ),
        (
            'In the order of the annotation files, by which MMDetection numbers the classes.',
            dict(classes=[repr(name) for name in train.classes], num_classes=str(len(train.classes))),
        ),
        ('As seen from where the training starts.', dict(data_root=repr(f'{Path(folder).as_posix()}/'))),
        ('', _model(base.model, checkpoint)),
        (
            '',
            dict(
                train_dataloader=dict(batch_size=str(batch_size), dataset=train_data),
                val_dataloader=dict(dataset=val_data),
                test_dataloader='val_dataloader',
                val_evaluator=dict(ann_file=f'data_root + {val.ann_file!r}'),
                test_evaluator='val_evaluator',
            ),
        ),
        (
            f'For {batch_size} images a step, where the base has {lr:g} for {base_batch_size}. '
            '--auto-scale-lr multiplies it by the processes.',
            dict(
                optim_wrapper=dict(optimizer=dict(lr=f'{lr * batch_size / base_batch_size:.6g}')),
                auto_scale_lr=dict(enable='False', base_batch_size=str(batch_size)),
            ),
        ),
    ]
    if epochs:
        sections.append((f'An epoch takes {iterations} iterations.', _schedule(base, epochs, iterations)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text('\n'.join(_section(comment, values) for comment, values in sections), encoding='utf-8')

    loop = base.train_cfg
    length = epochs or (loop.max_epochs if 'max_epochs' in loop else loop.max_iters / iterations)
    report = [
        f'classes   {len(train.classes)}: {", ".join(train.classes)}',
        f'train     {train}',
        f'val       {val}',
        f'training  {round(length, 1):g} epochs, {length * iterations:.0f} iterations of {batch_size} images',
    ]
    notes = [f'{split.ann_file}: {note}' for split in (train, val) for note in split.notes]
    if 0 in train.boxes:
        unseen = ', '.join(name for name, count in zip(train.classes, train.boxes) if not count)
        notes.append(f'no box to learn from: {unseen}')
    start = base.model.backbone.get('init_cfg') or {}
    if not checkpoint and start.get('type') == 'Pretrained' and not Path(start.checkpoint).is_file():
        notes.append(f'starts from {start.checkpoint}, which is not there: see {path.parent / "README.md"}')
    return report + [f'note      {note}' for note in notes]


def read_coco_folder(folder: Union[str, Path]) -> Tuple[Split, Split]:
    """Finds the training and the validation part of a folder and checks them.

    Layouts: ``annotations/instances_{train,val}*.json`` or ``annotations/{train,val}*.json`` with images in
    ``{train,val}*/``, ``images/{train,val}*/``, ``images/`` or paths from the folder itself; and Roboflow's
    ``{train,valid}/_annotations.coco.json`` beside the images.

    Args:
        folder: Such as ``data/mine``.

    Returns:
        Training and validation part, with the same classes in the same order. These are all of the file, used or
        not, as MMDetection has them.

    Raises:
        FileNotFoundError: There is no such folder, or annotations or images are missing.
        ValueError: A file that is not COCO's format, refers to what is not there, or has boxes that cannot be
            meant; or parts that do not belong together.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder')
    train, val = (_read_split(root, split) for split in ('train', 'val'))
    if train.classes != val.classes:
        lacking = ', '.join(sorted(set(train.classes) ^ set(val.classes)))
        reason = f'one lacks {lacking}' if lacking else 'the order differs, which numbers them'
        raise ValueError(f'{folder}: {train.ann_file} and {val.ann_file} need the same categories, but {reason}')
    return train, val


def _read_split(root: Path, split: str) -> Split:
    file = _annotation_file(root, split)
    coco = _read_coco(file)
    images = {image['id']: image for image in coco['images']}
    boxes = dict.fromkeys((category['id'] for category in coco['categories']), 0)
    odd = []
    for ann in coco['annotations']:
        for key, known in (('image_id', images), ('category_id', boxes)):
            if ann[key] not in known:
                raise ValueError(f'{file}: annotation {ann["id"]} has {key} {ann[key]}, which is not there')
        boxes[ann['category_id']] += 1
        if _is_odd(ann['bbox'], images[ann['image_id']]):
            odd.append(ann)
    total = len(coco['annotations'])
    notes = []
    if odd:
        notes.append(
            f'{len(odd)} of {total} boxes are under a pixel wide or high, or reach beyond their image, '
            f'such as {odd[0]["bbox"]} of annotation {odd[0]["id"]}'
        )
        if len(odd) > MAX_ODD_BOXES * total:
            raise ValueError(f'{file}: {notes[0]}; a box is [left, top, width, height] in pixels')
    if split == 'val' and any(ann['id'] == 0 for ann in coco['annotations']):
        notes.append('the annotation with the id 0 counts as never found: to pycocotools, 0 is no annotation')
    return Split(
        ann_file=file.relative_to(root).as_posix(),
        img_dir=f'{_image_folder(root, split, file, [x["file_name"] for x in coco["images"]])}/',
        classes=[category['name'] for category in coco['categories']],
        boxes=list(boxes.values()),
        num_masks=sum(bool(ann.get('segmentation')) for ann in coco['annotations']),
        num_images=len(images),
        num_annotated=len({ann['image_id'] for ann in coco['annotations']}),
        notes=notes,
    )


def _annotation_file(root: Path, split: str) -> Path:
    patterns = [pattern.format(split=split) for pattern in ANNOTATIONS]
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            names = ', '.join(path.relative_to(root).as_posix() for path in found)
            raise ValueError(f'{root}: one annotation file is needed for {split}, found {names}')
        if found:
            return found[0]
    raise FileNotFoundError(f'{root}: no annotations for {split}; looked for {", ".join(patterns)}')


def _read_coco(file: Path) -> Dict[str, List[dict]]:
    """The file, with all that MMDetection and pycocotools rely on."""
    try:
        coco = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f'{file}: is not JSON: {error}') from None
    for kind, keys in REQUIRED.items():
        entries = coco.get(kind) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f'{file}: has no {kind}; needed are {", ".join(REQUIRED)}')
        for entry in entries:
            known = entry if isinstance(entry, dict) else {}
            wrong = [key for key, types in keys.items() if not isinstance(known.get(key), types)]
            if wrong:
                raise ValueError(f"{file}: {', '.join(wrong)} not as in COCO's {kind}: {reprlib.repr(entry)}")
        identifier, count = Counter(entry['id'] for entry in entries).most_common(1)[0]
        if count > 1:
            raise ValueError(f'{file}: {count} {kind} have the id {identifier}')
    for ann in coco['annotations']:
        box = ann['bbox']
        if len(box) != 4 or not all(isinstance(x, NUMBER) and math.isfinite(x) for x in box):
            raise ValueError(f'{file}: the box of annotation {ann["id"]} is not four numbers: {reprlib.repr(box)}')
    return coco


def _is_odd(box: List[float], image: Dict[str, Any]) -> bool:
    x, y, width, height = box
    # With a pixel of tolerance, for those who count from 1.
    beyond = x < -1 or y < -1 or x + width > image['width'] + 1 or y + height > image['height'] + 1
    return beyond or width < 1 or height < 1


def _image_folder(root: Path, split: str, file: Path, names: List[str]) -> str:
    """The folder, below the root, that has all the images."""
    folders = [path for pattern in IMAGES for path in sorted(root.glob(pattern.format(split=split))) if path.is_dir()]
    missing = {path: [name for name in names if not (path / name).is_file()] for path in [*folders, root]}
    best = min(missing, key=lambda path: len(missing[path]))
    if missing[best]:
        looked = ', '.join(f'{path.relative_to(root).as_posix()}/' for path in missing)
        raise FileNotFoundError(
            f'{root}: {len(missing[best])} of {len(names)} images of {file.relative_to(root).as_posix()} are missing, '
            f'such as {missing[best][0]}; looked in {looked}'
        )
    return best.relative_to(root).as_posix()


def _check_masks(model: ConfigDict, name: str, train: Split, val: Split) -> None:
    boxes, masks = sum(train.boxes + val.boxes), train.num_masks + val.num_masks
    if 'mask_head' in model.get('roi_head', {}) and masks < boxes:
        box_configs = sorted(set(list_models(task='detection')) - set(list_models(task='instance-segmentation')))
        (close,) = get_close_matches(name, box_configs, n=1, cutoff=0)
        raise ValueError(
            f'{name} learns masks, which {boxes - masks} of {boxes} annotations lack; a config for boxes is {close}'
        )


# Below, overrides are nested dicts and lists with Python sources as leaves.


def _model(model: ConfigDict, checkpoint: Optional[str]) -> Dict[str, Any]:
    """What differs in the model, and where it starts."""
    overrides: Dict[str, Any] = dict(model=_num_classes(model, '_base_.model'))
    if not checkpoint:
        return overrides
    backbone = MODELS.build({key: value for key, value in model.backbone.items() if key != 'init_cfg'})
    load_pretrained(backbone, checkpoint)
    converted = convert(load(checkpoint), family=model.backbone.type.lower())
    if any(key.startswith(('rpn_head.', 'bbox_head.')) for key in converted.state_dict):
        if converted.source != 'mmvitzoo':
            raise ValueError(
                f'{checkpoint}: a whole detector of the {converted.source} layout; '
                'tools/model_converters/official2mm.py makes one of ours from it'
            )
        overrides['model']['backbone'] = dict(init_cfg='None')
        overrides['load_from'] = repr(str(checkpoint))
    else:
        fresh = dict(_delete_='True') if 'init_cfg' in model.backbone else {}
        init_cfg = dict(fresh, type="'Pretrained'", checkpoint=repr(str(checkpoint)))
        overrides['model']['backbone'] = dict(init_cfg=init_cfg)
    return overrides


def _num_classes(part: ConfigDict, name: str) -> Dict[str, Any]:
    """Every ``num_classes`` below a part of the model."""
    overrides: Dict[str, Any] = {}
    for key, value in part.items():
        if key == 'num_classes':
            overrides[key] = 'num_classes'
        elif isinstance(value, dict):
            overrides[key] = _num_classes(value, f'{name}.{key}')
        elif isinstance(value, list) and any(isinstance(x, dict) and 'num_classes' in x for x in value):
            # MMEngine replaces lists whole.
            overrides[key] = f'[dict(x, num_classes=num_classes) for x in {name}.{key}]'
    return {key: value for key, value in overrides.items() if value}


def _data(dataset: ConfigDict, name: str, split: Split, epochs: Optional[int]) -> Dict[str, Any]:
    """What differs in a data set, or in the one that is repeated or balanced."""
    if 'dataset' in dataset:
        overrides = dict(dataset=_data(dataset.dataset, f'{name}.dataset', split, epochs))
        return dict(times='1', **overrides) if epochs and 'times' in dataset else overrides
    metainfo = dict(classes='classes')
    if len(split.classes) > COCO_COLOURS:
        metainfo['palette'] = "'random'"
    overrides = dict(
        data_root='data_root',
        metainfo=metainfo,
        ann_file=repr(split.ann_file),
        data_prefix=dict(img=repr(split.img_dir)),
    )
    if split.num_masks < sum(split.boxes) and any(step.get('with_mask') for step in dataset.pipeline):
        overrides['pipeline'] = f"[dict(x, with_mask=False) if 'with_mask' in x else x for x in {name}.pipeline]"
    return overrides


def _iterations(dataset: ConfigDict, train: Split, batch_size: int, epochs: Optional[int]) -> int:
    """Of an epoch."""
    filtered = (_innermost(dataset).get('filter_cfg') or {}).get('filter_empty_gt')
    images = train.num_annotated if filtered else train.num_images
    return math.ceil(images * (1 if epochs else dataset.get('times', 1)) / batch_size)


def _innermost(dataset: ConfigDict) -> ConfigDict:
    return _innermost(dataset.dataset) if 'dataset' in dataset else dataset


def _schedule(base: ConfigDict, epochs: int, iterations: int) -> Dict[str, Any]:
    """The base's schedule in the length of some epochs of so many iterations."""
    unit = 'max_epochs' if 'max_epochs' in base.train_cfg else 'max_iters'
    lengths = dict(max_epochs=epochs, max_iters=epochs * iterations)

    def moved(time: int) -> int:
        return max(1, round(time * lengths[unit] / base.train_cfg[unit]))

    schedulers = []
    for scheduler in base.param_scheduler:
        scheduler = {key: value for key, value in scheduler.items() if key != '_scope_'}
        if scheduler['type'] == 'LinearLR':  # the warm-up
            length = lengths['max_epochs' if scheduler.get('by_epoch', True) else 'max_iters']
            scheduler['end'] = min(scheduler['end'], max(2, length // 10))  # of one step, it would never end
        else:
            for key in ('begin', 'end', 'T_max'):
                if scheduler.get(key):
                    scheduler[key] = moved(scheduler[key])
            if 'milestones' in scheduler:
                scheduler['milestones'] = [moved(time) for time in scheduler['milestones']]
        schedulers.append({key: repr(value) for key, value in scheduler.items()})
    interval = base.default_hooks.checkpoint.interval
    return dict(
        train_cfg={unit: str(lengths[unit]), 'val_interval': str(moved(base.train_cfg.val_interval))},
        param_scheduler=schedulers,
        default_hooks=dict(checkpoint=dict(interval=str(moved(interval)))),
    )


def _section(comment: str, values: Dict[str, Any]) -> str:
    lines = [f'# {comment}'] if comment else []
    lines += [f'{name} = {_source(value)}' for name, value in values.items()]
    return '\n'.join(lines) + '\n'


def _source(value: Any, indent: str = '') -> str:
    """Python for nested dicts and lists of sources, an entry a line where one line is too long."""
    if isinstance(value, str):
        return value
    start, end = ('dict(', ')') if isinstance(value, dict) else ('[', ']')
    entries = [(f'{key}=', x) for key, x in value.items()] if isinstance(value, dict) else [('', x) for x in value]
    line = start + ', '.join(name + _source(x) for name, x in entries) + end
    if len(line) <= 80:
        return line
    deeper = indent + '    '
    return start + ''.join(f'\n{deeper}{name}{_source(x, deeper)},' for name, x in entries) + f'\n{indent}{end}'
