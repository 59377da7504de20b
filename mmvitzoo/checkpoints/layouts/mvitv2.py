"""Layouts of MViTv2 checkpoints."""

import re
from functools import partial
from typing import Dict

from torch import Tensor

from ...models.backbones.mvitv2 import stage_starts
from .detectron2 import RETINANET, fpn, heads, reorder_anchors, restore_anchors
from .layout import Layout, Unsupported, backbone_under, unchanged

# Names that the authors, Detectron2, timm, MMPretrain and this package share.
_IN_BLOCK = (
    *(f'attn.{name}.{{leaf}}' for name in ('qkv', 'proj')),
    *(f'attn.{part}_{name}.{{leaf}}' for part in ('pool', 'norm') for name in 'qkv'),
    *('attn.rel_pos_h', 'attn.rel_pos_w', 'norm{i}.{leaf}', 'mlp.fc{i}.{leaf}'),
)
_BLOCKS = {
    **unchanged(*(f'blocks.{{b}}.{name}' for name in _IN_BLOCK)),
    'blocks.{b}.proj.{leaf}': 'blocks.{b}.shortcut_proj.{leaf}',
}
_PATCH_EMBED = unchanged('patch_embed.proj.{leaf}')
OFFICIAL = {**_PATCH_EMBED, **_BLOCKS, 'norm.{leaf}': 'norm3.{leaf}'}
DETECTRON2 = {
    **_PATCH_EMBED,
    **_BLOCKS,
    **{f'scale{stage + 2}_norm.{{leaf}}': f'norm{stage}.{{leaf}}' for stage in range(4)},
}
MMPRETRAIN = {'patch_embed.projection.{leaf}': 'patch_embed.proj.{leaf}', **_BLOCKS, **unchanged('norm3.{leaf}')}
# timm counts blocks within their stage and has two names for the shortcut projection; see flatten_stages.
TIMM = {
    **_PATCH_EMBED,
    **unchanged(*(f'stages.{{s}}.blocks.{{b}}.{name}' for name in _IN_BLOCK)),
    **unchanged(*(f'stages.{{s}}.blocks.{{b}}.shortcut_proj_{part}.{{leaf}}' for part in ('attn', 'mlp'))),
    'norm.{leaf}': 'norm3.{leaf}',
}
# The names differ little from the authors': every key has to be a known one.
OURS = unchanged(*_PATCH_EMBED, *_BLOCKS.values(), *(f'norm{stage}.{{leaf}}' for stage in range(4)))
_CLASS_TOKEN = Unsupported(
    'is a class token, which these models do not have; without it, all feature maps of the network would change'
)


def flatten_stages(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Renames timm's blocks of a stage to blocks of the network."""
    pattern = re.compile(r'backbone\.stages\.(\d+)\.blocks\.(\d+)\.(.+)')
    matches = {key: match for key, match in ((key, pattern.fullmatch(key)) for key in state_dict) if match}
    blocks = [(int(match[1]), int(match[2])) for match in matches.values()]
    num_layers = [1 + max((block for s, block in blocks if s == stage), default=-1) for stage in range(4)]
    for key, match in matches.items():
        block = sum(num_layers[: int(match[1])]) + int(match[2])
        name = f'backbone.blocks.{block}.{re.sub("^shortcut_proj_(attn|mlp)", "shortcut_proj", match[3])}'
        if name in state_dict:
            raise ValueError(f'{name} is there twice')
        state_dict[name] = state_dict.pop(key)


def group_stages(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Renames blocks of the network to timm's blocks of a stage."""
    prefix = 'backbone.'
    backbone = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    starts = [0, *stage_starts(backbone)]
    grouped = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r'backbone\.blocks\.(\d+)\.(.+)', key)
        if match:
            block, rest = int(match[1]), match[2]
            stage = sum(block >= start for start in starts) - 1
            if rest.startswith('shortcut_proj.'):
                norm1, norm2 = (backbone[f'blocks.{block}.norm{i}.weight'] for i in (1, 2))
                part = 'mlp' if norm1.shape == norm2.shape else 'attn'  # the half that changes the width
                rest = rest.replace('shortcut_proj.', f'shortcut_proj_{part}.')
            key = f'{prefix}stages.{stage}.blocks.{block - starts[stage]}.{rest}'
        grouped[key] = value
    return grouped


_layout = partial(Layout, 'mvitv2', 'MViTv2')
_DETECTRON2 = 'backbone.bottom_up.'

LAYOUTS = [
    _layout(
        'detectron2',
        (_DETECTRON2 + 'blocks.0.attn.pool_q.weight', 'head.cls_score.weight'),
        {**backbone_under(_DETECTRON2, DETECTRON2), **RETINANET},
        reorder_anchors,
        restore_anchors,
    ),
    _layout(
        'detectron2',
        (_DETECTRON2 + 'blocks.0.attn.pool_q.weight',),
        {**backbone_under(_DETECTRON2, DETECTRON2), **fpn(2), **heads(norm='bn')},
    ),
    _layout(
        'detectron2',
        ('patch_embed.proj.weight', 'blocks.0.attn.pool_q.weight', 'scale5_norm.weight'),
        backbone_under('', DETECTRON2),
    ),
    _layout(
        'timm',
        ('patch_embed.proj.weight', 'stages.0.blocks.0.attn.pool_q.weight'),
        {**backbone_under('', TIMM), **unchanged('head.fc.{leaf}'), 'cls_token': _CLASS_TOKEN},
        flatten_stages,
        group_stages,
    ),
    *(
        _layout(
            'mmpretrain',
            (prefix + 'patch_embed.projection.weight', prefix + 'blocks.0.attn.pool_q.weight'),
            {
                **backbone_under(prefix, MMPRETRAIN),
                prefix + 'norm{i}.{leaf}': Unsupported(
                    'comes from a model whose stages read the normalized map of the stage before; those of this '
                    'package, like the published ones, do not'
                ),
                prefix + 'cls_token': _CLASS_TOKEN,
                prefix + 'pos_embed': Unsupported('are absolute positions, which only the first version of MViT has'),
                **(unchanged('head.fc.{leaf}') if prefix else {}),
            },
        )
        for prefix in ('backbone.', '')
    ),
    _layout(
        'official',
        ('patch_embed.proj.weight', 'blocks.0.attn.pool_q.weight', 'norm.weight'),
        {**backbone_under('', OFFICIAL), 'head.projection.{leaf}': 'head.fc.{leaf}', 'cls_token': _CLASS_TOKEN},
    ),
    # This package's: of a whole model, and of a backbone alone.
    _layout(
        'mmvitzoo',
        ('backbone.patch_embed.proj.weight', 'backbone.blocks.0.attn.pool_q.weight'),
        {
            **backbone_under('backbone.', OURS),
            'backbone.{rest}': Unsupported("is no weight of this package's MViTv2"),
            **unchanged('{rest}'),
        },
    ),
    _layout('mmvitzoo', ('patch_embed.proj.weight', 'blocks.0.attn.pool_q.weight'), backbone_under('', OURS)),
]
