"""Layouts of MViTv2 checkpoints."""

import re
from typing import Any, Dict, List

from mmengine.registry import MODELS
from torch import Tensor

from .detectron2 import RETINANET, fpn, heads, reorder_anchors
from .layout import Layout, Refuse, backbone_under

# What the authors, Detectron2, timm and MMPretrain call alike.
_ATTENTION = (
    *(f'attn.{name}.{{leaf}}' for name in ('qkv', 'proj')),
    *(f'attn.{kind}_{name}.{{leaf}}' for kind in ('pool', 'norm') for name in 'qkv'),
    *(f'attn.rel_pos_{axis}' for axis in 'hw'),
)
_BLOCKS = {
    'blocks.{b}.norm{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    **{f'blocks.{{b}}.{name}': f'blocks.{{b}}.{name}' for name in _ATTENTION},
    'blocks.{b}.mlp.fc{i}.{leaf}': 'blocks.{b}.mlp.fc{i}.{leaf}',
    'blocks.{b}.proj.{leaf}': 'blocks.{b}.skip.{leaf}',
}
OFFICIAL = {'patch_embed.proj.{leaf}': 'stem.{leaf}', **_BLOCKS, 'norm.{leaf}': 'norm3.{leaf}'}
DETECTRON2 = {
    'patch_embed.proj.{leaf}': 'stem.{leaf}',
    **_BLOCKS,
    **{f'scale{stage + 2}_norm.{{leaf}}': f'norm{stage}.{{leaf}}' for stage in range(4)},
}
MMPRETRAIN = {'patch_embed.projection.{leaf}': 'stem.{leaf}', **_BLOCKS, 'norm3.{leaf}': 'norm3.{leaf}'}
# timm counts blocks within their stage and tells the two kinds of skip connection apart; see flatten.
TIMM = {
    'patch_embed.proj.{leaf}': 'stem.{leaf}',
    'stages.{s}.blocks.{b}.shortcut_proj_attn.{leaf}': 'stages.{s}.blocks.{b}.attn_skip.{leaf}',
    'stages.{s}.blocks.{b}.shortcut_proj_mlp.{leaf}': 'stages.{s}.blocks.{b}.mlp_skip.{leaf}',
    **{
        f'stages.{{s}}.blocks.{{b}}.{name}': f'stages.{{s}}.blocks.{{b}}.{name}'
        for name in (*_ATTENTION, 'norm{i}.{leaf}', 'mlp.fc{i}.{leaf}')
    },
    'norm.{leaf}': 'norm3.{leaf}',
}
_TOKEN = Refuse(
    'is a class token, which these models do not have; without it, every map of the network would be another one'
)
_NORMALISED = Refuse(
    'comes from a model whose stages read the normalised map of the stage before; those of this package, as '
    'the published ones, do not'
)


def flatten(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """timm's blocks of a stage -> blocks of the network."""
    numbers = [re.match(r'backbone\.stages\.(\d+)\.blocks\.(\d+)\.', key) for key in state_dict]
    stages = [(int(match[1]), int(match[2])) for match in numbers if match]
    sizes = [1 + max((block for s, block in stages if s == stage), default=-1) for stage in range(4)]
    for key in list(state_dict):
        match = re.fullmatch(r'backbone\.stages\.(\d+)\.blocks\.(\d+)\.(.+)', key)
        if match:
            block = sum(sizes[: int(match[1])]) + int(match[2])
            rest = re.sub('^(attn|mlp)_skip', 'skip', match[3])
            name = f'backbone.blocks.{block}.{rest}'
            if name in state_dict:
                raise ValueError(f'{name} is there twice')
            state_dict[name] = state_dict.pop(key)


def group(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Blocks of the network -> timm's of a stage."""
    prefix = 'backbone.'
    starts = [0, *stage_starts({key[len(prefix) :]: value for key, value in state_dict.items()})]
    grouped = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r'backbone\.blocks\.(\d+)\.(.+)', key)
        if match:
            block = int(match[1])
            stage = sum(block >= start for start in starts) - 1
            norms = (f'{prefix}blocks.{block}.norm{i}.weight' for i in (1, 2))
            rest = match[2]
            if rest.startswith('skip.'):
                rest = ('mlp_' if state_dict[next(norms)].shape == state_dict[next(norms)].shape else 'attn_') + rest
            key = f'{prefix}stages.{stage}.blocks.{block - starts[stage]}.{rest}'
        grouped[key] = value
    return grouped


def stage_starts(backbone: Dict[str, Tensor]) -> List[int]:
    """First blocks of the stages but the first: their attention is wider than the one before."""
    widths: List[int] = []
    while f'blocks.{len(widths)}.attn.proj.weight' in backbone:
        widths.append(len(backbone[f'blocks.{len(widths)}.attn.proj.weight']))
    return [b for b in range(1, len(widths)) if widths[b] > widths[b - 1]]


def backbone_cfg(backbone: Dict[str, Tensor]) -> Dict[str, Any]:
    """Config of the MViTv2 whose weights these are, in our names.

    Shapes do not tell whether attention is windowed: a norm for another map than the last says so,
    for it is of a model for dense prediction.
    """
    starts = stage_starts(backbone)
    num_layers = 1 + max(int(key.split('.')[1]) for key in backbone if key.startswith('blocks.'))
    ends = (*starts, num_layers)
    head_dim = len(backbone['blocks.0.attn.pool_q.weight'])
    arch: Dict[str, Any] = dict(
        embed_dims=len(backbone['stem.weight']),
        num_layers=num_layers,
        num_heads=len(backbone['blocks.0.attn.proj.weight']) // head_dim,
        downscale_indices=tuple(starts),
    )
    # A backbone that returns only early maps has no later stages.
    for name, variant in MODELS.get('MViTv2').arch_zoo.items():
        early = (*variant['downscale_indices'], variant['num_layers'])[: len(ends)] == ends
        if early and all(variant[key] == arch[key] for key in ('embed_dims', 'num_heads')):
            arch = name
            break
    else:
        if len(ends) < 4:
            raise KeyError(f'blocks.{num_layers}')
    out_indices = tuple(stage for stage in range(4) if f'norm{stage}.weight' in backbone)
    windowed = out_indices not in ((), (3,))
    cfg: Dict[str, Any] = dict(type='MViTv2', arch=arch)
    if windowed:
        cfg.update(window_attention=True, out_indices=out_indices)
    if starts:
        before = starts[0] - 1
        if backbone[f'blocks.{before}.norm2.weight'].shape != backbone[f'blocks.{starts[0]}.norm1.weight'].shape:
            cfg['dim_mul_in_attention'] = False
    # Tables of the first block are those of its window, where it has one; of the last block never. If
    # the last block is also the first of its stage, its keys have the stride of the stage before.
    block, stride = (num_layers - 1, 4 * 2 ** len(starts)) if windowed and starts else (0, 4)
    if block in starts and len(starts) == 3:
        stride //= 2
    size = tuple(stride * (len(backbone[f'blocks.{block}.attn.rel_pos_{axis}']) + 1) // 2 for axis in 'hw')
    if size != (224, 224) and not (windowed and not starts):
        cfg['img_size'] = size[0] if size[0] == size[1] else size
    return cfg


def _layout(source, signature, table, finish=None, restore=None) -> Layout:
    return Layout('mvitv2', source, signature, table, backbone_cfg, finish, restore)


LAYOUTS = [
    _layout(
        'detectron2',
        ('backbone.bottom_up.blocks.0.attn.pool_q.weight', 'head.cls_score.weight'),
        {**backbone_under('backbone.bottom_up.', DETECTRON2), **RETINANET},
        reorder_anchors,
    ),
    _layout(
        'detectron2',
        ('backbone.bottom_up.blocks.0.attn.pool_q.weight',),
        {**backbone_under('backbone.bottom_up.', DETECTRON2), **fpn(2), **heads(norm='bn')},
    ),
    _layout(
        'detectron2',
        ('patch_embed.proj.weight', 'blocks.0.attn.pool_q.weight', 'scale5_norm.weight'),
        backbone_under('', DETECTRON2),
    ),
    _layout(
        'timm',
        ('patch_embed.proj.weight', 'stages.0.blocks.0.attn.pool_q.weight'),
        {**backbone_under('', TIMM), 'head.fc.{leaf}': 'head.fc.{leaf}', 'cls_token': _TOKEN},
        flatten,
        group,
    ),
    *(
        _layout(
            'mmpretrain',
            (prefix + 'patch_embed.projection.weight', prefix + 'blocks.0.attn.pool_q.weight'),
            {
                **backbone_under(prefix, MMPRETRAIN),
                prefix + 'norm{i}.{leaf}': _NORMALISED,
                prefix + 'cls_token': _TOKEN,
                prefix + 'pos_embed': Refuse('are absolute positions, which only the first version of MViT has'),
                **({'head.fc.{leaf}': 'head.fc.{leaf}'} if prefix else {}),
            },
        )
        for prefix in ('backbone.', '')
    ),
    _layout(
        'official',
        ('patch_embed.proj.weight', 'blocks.0.attn.pool_q.weight'),
        {
            **backbone_under('', OFFICIAL),
            'head.projection.{leaf}': 'head.fc.{leaf}',
            'cls_token': _TOKEN,
        },
    ),
    # Ours, as written by a toolbox around the backbone, and bare.
    _layout('mmvitzoo', ('backbone.stem.weight', 'backbone.blocks.0.attn.pool_q.weight'), {'{rest}': '{rest}'}),
    _layout('mmvitzoo', ('stem.weight', 'blocks.0.attn.pool_q.weight'), {'{rest}': 'backbone.{rest}'}),
]
