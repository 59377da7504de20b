"""Counts parameters, FLOPs and activations of a config's model: get_flops.py CONFIG [--shape H W] [--json].

The module mmvitzoo.analysis.cost describes the conventions.
"""

import argparse
import json
from dataclasses import asdict

from mmvitzoo.analysis.cost import measure
from mmvitzoo.engine import read_config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='path of a config, or a name of mmvitzoo.list_models()')
    parser.add_argument(
        '--shape', nargs=2, type=int, metavar=('H', 'W'), help='image size in pixels (default: as in published tables)'
    )
    parser.add_argument('--json', action='store_true', help='print the result as JSON')
    args = parser.parse_args()
    if args.shape and min(args.shape) < 32:
        parser.error(f'--shape: images have at least 32 pixels a side, got {args.shape}')
    try:
        cost = measure(read_config(args.config), args.shape)
    except NotImplementedError as error:
        parser.exit(1, f'{args.config}: {error}\n')
    if args.json:
        print(json.dumps(asdict(cost)))
        return
    print(f'image (H, W)             {cost.shape}')
    print(f'parameters               {cost.params / 1e6:.3f} M')
    print(f'FLOPs, all operations    {cost.flops / 1e9:.3f} G')
    print(f'FLOPs, modules only      {cost.module_flops / 1e9:.3f} G')
    print(f'activations              {cost.activations / 1e6:.3f} M')


if __name__ == '__main__':
    main()
