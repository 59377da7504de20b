"""Plots the losses and metrics of trainings over their iterations: curves.py WORK_DIR [WORK_DIR ...] --out PNG.

Of several trainings it plots the total losses and the metrics in one picture, to compare them.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dirs', type=Path, nargs='+', help='work directories; the latest log of each is read')
    parser.add_argument('--out', required=True, help='image file to write')
    parser.add_argument(
        '--metrics',
        nargs='+',
        default=['coco/bbox_mAP', 'coco/segm_mAP', 'mIoU', 'accuracy/top1'],
        metavar='NAME',
        help='metrics to plot if the log has them (default: %(default)s)',
    )
    args = parser.parse_args()

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    several = len(args.work_dirs) > 1
    for work_dir in args.work_dirs:
        logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
        if not logs:
            parser.exit(1, f'{work_dir}: no training log (*/vis_data/scalars.json)\n')
        records = [json.loads(line) for line in logs[-1].read_text().splitlines()]
        training = [record for record in records if 'loss' in record]
        validations = [record for record in records if any(name in record for name in args.metrics)]
        if not training:
            parser.exit(1, f'{logs[-1]}: contains no losses\n')

        losses = ['loss'] if several else [name for name in training[0] if name.startswith('loss')]
        for name in losses:
            label, width = (work_dir.name, 1.5) if several else (name, 2.5 if name == 'loss' else 1)
            left.plot([x['step'] for x in training], [x[name] for x in training], label=label, linewidth=width)
        # In epoch-based trainings the step of a validation is its epoch; map it to the last iteration of that epoch.
        last_iteration = {record['epoch']: record['step'] for record in training if 'epoch' in record}
        for name in (name for name in args.metrics if validations and name in validations[-1]):
            label = f'{work_dir.name}: {name}' if several else name
            steps = [last_iteration.get(x['step'], x['step']) for x in validations]
            right.plot(steps, [x[name] for x in validations], marker='o', label=label)
            print(f'{label}: {validations[-1][name]:.3f}')
    left.set(xlabel='iteration', ylabel='loss', yscale='log')
    left.legend(loc='upper right', fontsize=8, ncols=1 if several else 2)
    right.set(xlabel='iteration', ylabel='validation metric')
    right.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.legend(loc='lower right', fontsize=8 if several else None)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == '__main__':
    main()
