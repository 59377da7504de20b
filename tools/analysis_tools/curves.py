"""Plots the losses and metrics of a training over its iterations: curves.py WORK_DIR --out PNG."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='work directory of the training; the latest log is read')
    parser.add_argument('--out', required=True, help='image file to write')
    parser.add_argument(
        '--metrics',
        nargs='+',
        default=['coco/bbox_mAP', 'coco/segm_mAP', 'mIoU', 'accuracy/top1'],
        metavar='NAME',
        help='metrics to plot if the log has them (default: %(default)s)',
    )
    args = parser.parse_args()

    logs = sorted(args.work_dir.glob('*/vis_data/scalars.json'))
    if not logs:
        parser.exit(1, f'{args.work_dir}: no training log (*/vis_data/scalars.json)\n')
    records = [json.loads(line) for line in logs[-1].read_text().splitlines()]
    training = [record for record in records if 'loss' in record]
    validations = [record for record in records if any(name in record for name in args.metrics)]
    if not training:
        parser.exit(1, f'{logs[-1]}: contains no losses\n')

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in (name for name in training[0] if name.startswith('loss')):
        width = 2.5 if name == 'loss' else 1
        left.plot([x['step'] for x in training], [x[name] for x in training], label=name, linewidth=width)
    left.set(xlabel='iteration', ylabel='loss', yscale='log')
    left.legend(loc='upper right', fontsize=8, ncols=2)
    # In epoch-based trainings the step of a validation is its epoch; map it to the last iteration of that epoch.
    last_iteration = {record['epoch']: record['step'] for record in training if 'epoch' in record}
    for name in (name for name in args.metrics if validations and name in validations[-1]):
        steps = [last_iteration.get(x['step'], x['step']) for x in validations]
        right.plot(steps, [x[name] for x in validations], marker='o', label=name)
        print(f'{name}: {validations[-1][name]:.3f}')
    right.set(xlabel='iteration', ylabel='validation metric')
    right.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.legend(loc='lower right')
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == '__main__':
    main()
