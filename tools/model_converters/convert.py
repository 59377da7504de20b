"""Converts a checkpoint to the key names of this package or of another one: convert.py SRC DST [--to TARGET].

The keys and shapes tell the family, the layout and the variant. Other targets than this package take a backbone, and
timm and MMPretrain its linear classifier as well. A plain ViT with relative positions becomes timm's image encoder of
Segment Anything, one with rotary positions timm's DINOv3, Perception Encoder or RoPE-ViT. A converted file keeps the
license of its source.
"""

import argparse
from collections import Counter
from typing import Dict, Optional, Tuple

from torch import Tensor

from mmvitzoo.checkpoints import CheckpointError, ConversionResult, convert, export, load, save
from mmvitzoo.checkpoints.layouts.vit_steps import ROTARY_BUFFERS
from mmvitzoo.models.backbones.vit import ACTS

TARGETS = {
    'mmvitzoo': 'this package',
    'timm': 'timm',
    'mmpretrain': "MMPretrain's VisionTransformer or MViT",
    'mmseg': "MMSegmentation's VisionTransformer",
}

ROPE_LAYOUTS = {  # timm's names by the `rope_type` of a PlainViT
    'dinov3': 'timm-dinov3',
    'pe': 'timm-pe',
    'sbb': 'timm-sbb',
    'axial': 'timm-rope-vit',
    'mixed': 'timm-rope-vit',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', help='checkpoint file or http(s) address')
    parser.add_argument('dst', help='file to write: .pth, or .safetensors for that format')
    targets = ', '.join(f'{name} ({owner})' for name, owner in TARGETS.items())
    parser.add_argument('--to', choices=TARGETS, default='mmvitzoo', help=f'names to write: {targets}')
    parser.add_argument('--key', help='entry of SRC that holds the weights, such as model_ema or student')
    parser.add_argument('--act', choices=ACTS, help='activation of a plain ViT, if its layout does not tell it')
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    return parser.parse_args()


def rename(
    state_dict: Dict[str, Tensor], target: str, act: Optional[str] = None
) -> Tuple[Dict[str, Tensor], ConversionResult]:
    """Renames weights to the names of a target.

    Args:
        state_dict: Weights in any known layout.
        target: One of ``TARGETS``.
        act: Activation of a plain ViT, see :func:`mmvitzoo.checkpoints.convert`.

    Returns:
        The renamed weights and the result of reading them. Its ``dropped`` names what the target has no place for.
    """
    result = convert(state_dict, act=act)
    if target == 'mmvitzoo':
        return result.state_dict, result
    layout, prefixes = target, ('backbone.', 'head.fc.')
    has_rope = 'rope' in result.backbone_cfg.get('pos_type', '')
    if has_rope and target != 'timm':
        raise CheckpointError(f'{target} has no rotary positions')
    if target == 'mmseg':  # its backbone reads files without a classifier
        prefixes = ('backbone.',)
    elif target == 'timm' and result.family == 'plainvit' and any('.rel_pos_' in key for key in result.backbone):
        # Segment Anything's encoder has neither a norm after the blocks nor a classifier.
        layout, prefixes = 'timm-sam', ('backbone.pos_embed', 'backbone.patch_embed.', 'backbone.blocks.')
    elif has_rope:
        layout = ROPE_LAYOUTS[result.backbone_cfg['rope_type']]
    kept = {key: value for key, value in result.state_dict.items() if key.startswith(prefixes)}
    for key in ROTARY_BUFFERS:
        if kept.pop(key, None) is not None:
            result.dropped[key] = 'timm computes rotary positions itself, in float32'
    for stage in range(3):  # no other package has norms for the maps of earlier stages
        for leaf in ('weight', 'bias'):
            kept.pop(f'backbone.norm{stage}.{leaf}', None)
    for key in result.state_dict.keys() - kept.keys() - {*ROTARY_BUFFERS}:
        result.dropped[key] = f'has no place in the {layout} layout'
    return export(kept, result.family, layout), result


def main() -> None:
    args = parse_args()
    try:
        weights, result = rename(load(args.src, args.key), args.to, args.act)
        save(weights, args.dst, overwrite=args.force)
    except FileExistsError as error:
        raise SystemExit(f'{error}; --force replaces it') from None
    except OSError as error:
        raise SystemExit(str(error)) from None
    except CheckpointError as error:
        message = str(error)
        raise SystemExit(message if args.src in message else f'{args.src}: {message}') from None
    print(f'family   {result.family} ({result.source} layout)')
    print(f'variant  {result.description}')
    print(f'tensors  {len(weights)}')
    for reason, count in Counter(result.dropped.values()).items():
        key = next(key for key, value in result.dropped.items() if value == reason)
        print(f'dropped  {count}: {reason}, such as {key}')
    if result.note:
        print(f'note     {result.note}')
    print(f'written  {args.dst}')


if __name__ == '__main__':
    main()
