"""Merges low-rank updates into the weights of a model: merge_lora.py CONFIG CHECKPOINT DST.

CONFIG is that of the training with LoRA, since a checkpoint does not hold the scale of the updates. DST fits the config
without LoRA, and model_converters/convert.py writes its backbone in other names.
"""

import argparse

from mmvitzoo.checkpoints import save
from mmvitzoo.engine import merge_lora
from mmvitzoo.inference import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config of the training with LoRA: a path, or a name of mmvitzoo.list_models()')
    parser.add_argument('checkpoint', help='path or URL of a checkpoint of the training')
    parser.add_argument('dst', help='file to write: .pth, or .safetensors for that format')
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    args = parser.parse_args()
    try:
        weights = merge_lora(load_model(args.config, args.checkpoint)).state_dict()
        save(weights, args.dst, overwrite=args.force)
    except FileExistsError as error:
        parser.exit(1, f'{error}; --force replaces it\n')
    except (OSError, ValueError) as error:
        parser.exit(1, f'{error}\n')
    print(f'written  {args.dst}: {len(weights)} tensors')


if __name__ == '__main__':
    main()
