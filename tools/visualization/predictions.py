"""Draws a detector's predictions beside the ground truth: predictions.py CONFIG CHECKPOINT --out PNG.

The tool draws the first images of the config's validation set, which must be in COCO format. Boxes have captions if
there are several classes.
"""

import argparse
import os.path as osp

import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from matplotlib.patches import Rectangle
from mmdet.apis import inference_detector
from mmengine.config import DictAction
from pycocotools.coco import COCO

from mmvitzoo import get_config
from mmvitzoo.inference import dataset_metainfo, load_model

COLORS = plt.get_cmap('tab10').colors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='path of a config or name from mmvitzoo.list_models()')
    parser.add_argument('checkpoint', help='path of a checkpoint')
    parser.add_argument('--out', required=True, help='image file to write')
    parser.add_argument('--num-images', type=int, default=12, help='number of images (default: %(default)s)')
    parser.add_argument('--columns', type=int, default=3, help='images in a row (default: %(default)s)')
    parser.add_argument('--score-thr', type=float, default=0.5, help='score threshold (default: %(default)s)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='values of the config to set',
    )
    args = parser.parse_args()

    config = get_config(args.config)
    config.merge_from_dict(args.cfg_options)
    dataset = config.val_dataloader.dataset
    coco = COCO(osp.join(dataset.data_root, dataset.ann_file))
    # The labels of the model follow the order of the config's classes, not that of the category ids.
    classes = list(dataset_metainfo(config)['classes'])
    model = load_model(config, args.checkpoint).to('cuda' if torch.cuda.is_available() else 'cpu')

    images = coco.loadImgs(sorted(coco.imgs)[: args.num_images])
    rows = -(-len(images) // args.columns)
    figure, axes = plt.subplots(rows, 2 * args.columns, figsize=(5 * args.columns, 2.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for i, info in enumerate(images):
        path = osp.join(dataset.data_root, dataset.data_prefix['img'], info['file_name'])
        image = mmcv.imread(path, channel_order='rgb')
        gt_axis, pred_axis = axes.flat[2 * i : 2 * i + 2]
        predictions = detections(inference_detector(model, path), args.score_thr, classes)
        draw(gt_axis, image, ground_truth(coco, info['id'], classes), 'ground truth', captions=len(classes) > 1)
        draw(pred_axis, image, predictions, 'prediction', captions=len(classes) > 1)
    figure.tight_layout(pad=0.4)
    figure.savefig(args.out, dpi=110)
    print(f'{args.out}: {len(images)} images')


def ground_truth(coco, image_id, classes):
    """Yields (class index, text, box as x1 y1 x2 y2, mask or None) of each object of the classes, without crowds."""
    for ann in coco.loadAnns(coco.getAnnIds(image_id)):
        text = coco.cats[ann['category_id']]['name']
        if ann.get('iscrowd') or text not in classes:
            continue
        x, y, w, h = ann['bbox']
        mask = coco.annToMask(ann).astype(bool) if ann.get('segmentation') else None
        yield classes.index(text), text, (x, y, x + w, y + h), mask


def detections(result, score_thr, classes):
    """Yields (class index, text with score, box as x1 y1 x2 y2, mask) of each detection above the threshold."""
    instances = result.pred_instances
    for instance in instances[instances.scores >= score_thr].numpy():
        label = int(instance.labels[0])
        mask = instance.masks[0].astype(bool) if 'masks' in instance else None
        yield label, f'{classes[label]} {instance.scores[0]:.2f}', instance.bboxes[0], mask


def draw(axis, image, objects, title, captions):
    canvas = image.astype(np.float32) / 255
    texts = []
    for label, text, (x1, y1, x2, y2), mask in objects:
        color = COLORS[label % len(COLORS)]
        if mask is not None:
            canvas[mask] = 0.4 * canvas[mask] + 0.6 * np.array(color)
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.5))
        texts.append((x1, y1, text, color))
    for x, y, text, color in texts if captions else ():  # after all boxes, so that no box covers a caption
        box = dict(facecolor=color, edgecolor='none', pad=1)
        axis.text(x, max(y - 2, 5), text, color='white', fontsize=8, va='bottom', bbox=box, clip_on=True)
    axis.imshow(canvas)
    axis.set_title(title, fontsize=9)


if __name__ == '__main__':
    main()
