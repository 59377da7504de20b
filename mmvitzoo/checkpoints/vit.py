"""Layouts of plain ViT and ViTDet checkpoints."""

import math
from collections import Counter
from typing import Any, Dict, Tuple

import torch
from mmengine.registry import MODELS
from torch import Tensor

from .detectron2 import heads
from .layout import Drop, Layout, backbone_under

# What timm, DeiT, MAE, Detectron2 and the ViTAE authors' ViTDet repository call alike.
_BLOCKS = {
    'blocks.{b}.norm{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    'blocks.{b}.attn.qkv.{leaf}': 'blocks.{b}.attn.qkv.{leaf}',
    'blocks.{b}.attn.proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'blocks.{b}.mlp.fc{i}.{leaf}': 'blocks.{b}.mlp.fc{i}.{leaf}',
}
_STEM = {'pos_embed': 'stem.pos_embed', 'patch_embed.proj.{leaf}': 'stem.projection.{leaf}'}
_NORM = {'norm.{leaf}': 'norm.{leaf}'}
RELATIVE = {
    'blocks.{b}.attn.rel_pos_h': 'blocks.{b}.attn.rel_pos_h',
    'blocks.{b}.attn.rel_pos_w': 'blocks.{b}.attn.rel_pos_w',
}
_RESIDUAL = {
    f'{theirs}.{kind}{i + 1}.{{leaf}}': f'blocks.{{b}}.residual.{3 * i + (kind == "norm")}.{{leaf}}'
    for theirs in ('blocks.{b}.residual',)
    for i in range(3)
    for kind in ('conv', 'norm')
}
TIMM = {**_STEM, 'cls_token': 'stem.cls_token', **_BLOCKS, **_NORM}
VITAE_REPO = {**_STEM, **_BLOCKS, **RELATIVE, **_NORM}
DETECTRON2 = {**_STEM, **_BLOCKS, **RELATIVE, **_RESIDUAL}
HUGGING_FACE = {
    'embeddings.position_embeddings': 'stem.pos_embed',
    'embeddings.projection.{leaf}': 'stem.projection.{leaf}',
    **{
        theirs.replace('blocks.', 'encoder.layer.').replace('.attn.', '.attention.'): ours
        for theirs, ours in {**_BLOCKS, **RELATIVE, **_RESIDUAL}.items()
    },
}
_OPENMMLAB = {
    'cls_token': 'stem.cls_token',
    'pos_embed': 'stem.pos_embed',
    'patch_embed.projection.{leaf}': 'stem.projection.{leaf}',
    'layers.{b}.ln{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    'layers.{b}.ffn.layers.0.0.{leaf}': 'blocks.{b}.mlp.fc1.{leaf}',
    'layers.{b}.ffn.layers.1.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
    'ln1.{leaf}': 'norm.{leaf}',
}
MMPRETRAIN = {
    **_OPENMMLAB,
    'layers.{b}.attn.qkv.{leaf}': 'blocks.{b}.attn.qkv.{leaf}',
    'layers.{b}.attn.proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
}
MMSEG = {
    **_OPENMMLAB,
    'layers.{b}.attn.attn.in_proj_{leaf}': 'blocks.{b}.attn.qkv.{leaf}',
    'layers.{b}.attn.attn.out_proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
}

# The pyramid inside the ViTAE authors' backbones.
VITAE_PYRAMID = {
    'fpn1.0.{leaf}': 'neck.rescale.0.0.{leaf}',
    'fpn1.1.ln.{leaf}': 'neck.rescale.0.1.{leaf}',
    'fpn1.3.{leaf}': 'neck.rescale.0.3.{leaf}',
    'fpn2.0.{leaf}': 'neck.rescale.1.0.{leaf}',
}


def _detectron2_pyramid(prefix: str) -> Dict[str, str]:
    table = {
        'simfp_2.0.{leaf}': 'neck.rescale.0.0.{leaf}',
        'simfp_2.1.{leaf}': 'neck.rescale.0.1.{leaf}',
        'simfp_2.3.{leaf}': 'neck.rescale.0.3.{leaf}',
        'simfp_3.0.{leaf}': 'neck.rescale.1.0.{leaf}',
    }
    for level, first in ((2, 4), (3, 1), (4, 0), (5, 1)):
        for i, name in enumerate(('lateral_convs', 'fpn_convs')):
            table[f'simfp_{level}.{first + i}.norm.{{leaf}}'] = f'neck.{name}.{level - 2}.ln.{{leaf}}'
            table[f'simfp_{level}.{first + i}.{{leaf}}'] = f'neck.{name}.{level - 2}.conv.{{leaf}}'
    return {prefix + theirs: ours for theirs, ours in table.items()}


def finish(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Leaves only positions that have a token in our backbone, as (1, tokens, C)."""
    name = 'backbone.stem.pos_embed'
    positions = state_dict[name]
    if positions.dim() == 4:  # Segment Anything's are a map
        positions = positions.flatten(1, 2)
    if 'dist_token' in dropped:
        positions = positions[:, [0, *range(2, positions.shape[1])]]
    num_positions = positions.shape[1]
    if 'backbone.stem.cls_token' not in state_dict and math.isqrt(num_positions - 1) ** 2 == num_positions - 1:
        positions = positions[:, 1:]
        dropped['pos_embed[:, :1]'] = 'position of a class token, which the model runs without'
    state_dict[name] = positions
    if any(key.startswith(('fc_norm.', 'pre_logits.')) for key in dropped):
        for leaf in ('weight', 'bias'):  # of the linear that comes after them
            if state_dict.pop(f'head.fc.{leaf}', None) is not None:
                dropped[f'head.{leaf}'] = _CLASSIFIER.reason


def finish_mmseg(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """MMSegmentation 1.2 builds the patch embedding without a bias unless told otherwise."""
    finish(state_dict, dropped)
    dim = len(state_dict['backbone.stem.projection.weight'])
    state_dict.setdefault('backbone.stem.projection.bias', torch.zeros(dim))


def fold_scale(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Takes into the relative positions that their repository multiplies them with a scaled query."""
    for key in state_dict:
        if key.endswith(('rel_pos_h', 'rel_pos_w')):
            state_dict[key] = state_dict[key] * state_dict[key].shape[-1] ** -0.5


def backbone_cfg(backbone: Dict[str, Tensor]) -> Dict[str, Any]:
    """Config of the PlainViT whose weights these are, in our names.

    Shapes do not tell everything. Without relative positions a variant that is not published has
    heads of 64 channels or a little more, and residual convolutions go with windows of 14 tokens;
    positions whose number is no square are those of the grid nearest to a
    square, wider than high; relative positions of one size in every block are those of windows,
    with four global blocks unless there are residual convolutions.
    """
    arch = plain_arch(backbone)
    positions, projection = backbone['stem.pos_embed'], backbone['stem.projection.weight']
    patch_size = projection.shape[-1]
    with_cls_token = 'stem.cls_token' in backbone
    cfg = dict(
        type='PlainViT',
        arch=next((name for name, variant in MODELS.get('PlainViT').arch_zoo.items() if variant == arch), arch),
        with_cls_token=with_cls_token,
        final_norm='norm.weight' in backbone,
    )
    grid = nearest_grid(positions.shape[1] - with_cls_token)
    residual = [b for b in range(arch['num_layers']) if f'blocks.{b}.residual.0.weight' in backbone]
    if residual:
        cfg['residual_block_indexes'] = residual
    img_grid = grid
    if 'blocks.0.attn.rel_pos_h' in backbone:
        cfg['use_rel_pos'] = True
        window, global_blocks, img_grid = attention_areas(backbone, arch['num_layers'], evenly=not residual)
        cfg.update(window_size=window, **({'global_attn_indexes': global_blocks} if global_blocks else {}))
    elif residual:
        cfg['window_size'] = 14
    img_grid = img_grid or grid
    if math.prod(img_grid) == positions.shape[1] - with_cls_token:
        grid = img_grid
    cfg['img_size'] = _pixels(img_grid, patch_size)
    if grid != img_grid:
        cfg['pretrain_img_size'] = _pixels(grid, patch_size)
    if patch_size != 16:
        cfg['patch_size'] = patch_size
    return cfg


def plain_arch(backbone: Dict[str, Tensor]) -> Dict[str, Any]:
    """Width, depth, heads and MLP ratio of plain blocks."""
    num_layers = 0
    while f'blocks.{num_layers}.norm1.weight' in backbone:
        num_layers += 1
    hidden, dim = backbone['blocks.0.mlp.fc1.weight'].shape
    ratio = hidden / dim
    arch = dict(embed_dims=dim, num_layers=num_layers, mlp_ratio=ratio)
    table = backbone.get('blocks.0.attn.rel_pos_h')
    published = (x['num_heads'] for x in MODELS.get('PlainViT').arch_zoo.values() if {**x, **arch} == x)
    nearest = next(n for n in range(max(dim // 64, 1), 0, -1) if dim % n == 0)
    heads = next(published, nearest) if table is None else dim // table.shape[1]
    return dict(embed_dims=dim, num_layers=num_layers, num_heads=heads, mlp_ratio=ratio)


def attention_areas(
    backbone: Dict[str, Tensor], num_layers: int, evenly: bool
) -> Tuple[int, Tuple[int, ...], Tuple[int, int]]:
    """Window size, global blocks, and the grid of their relative positions, if there are any.

    Args:
        backbone: Weights in our names.
        num_layers: Blocks.
        evenly: If tables do not tell, take four evenly spaced blocks as global.
    """
    lengths = [tuple(len(backbone[f'blocks.{b}.attn.rel_pos_{axis}']) for axis in 'hw') for b in range(num_layers)]
    (length, _), _ = Counter(lengths).most_common(1)[0]
    others = tuple(b for b in range(num_layers) if lengths[b] != (length, length))
    if not others and evenly and num_layers >= 4:
        others = tuple((i + 1) * num_layers // 4 - 1 for i in range(4))
    grid = tuple((x + 1) // 2 for x in lengths[others[0]]) if others else None
    return (length + 1) // 2, others, grid


def nearest_grid(number: int) -> Tuple[int, int]:
    """Rows and columns of a grid of ``number`` places, as near to a square as can be."""
    rows = next(rows for rows in range(math.isqrt(number), 0, -1) if number % rows == 0)
    return rows, number // rows


def _pixels(grid: Tuple[int, int], patch_size: int) -> Any:
    height, width = (side * patch_size for side in grid)
    return height if height == width else (height, width)


_NO_TOKEN = Drop('PlainViT has no distillation token; its position and its head are left out, too')
_CLASSIFIER = Drop('belongs to a form of classifier head that is not converted')
_DECODER = Drop('belongs to the decoder of masked autoencoding')
_TIMM = {
    **backbone_under('', TIMM),
    'head.{leaf}': 'head.fc.{leaf}',
    'dist_token': _NO_TOKEN,
    'head_dist.{leaf}': _NO_TOKEN,
    'pre_logits.{rest}': _CLASSIFIER,
    'fc_norm.{leaf}': _CLASSIFIER,
    'mask_token': _DECODER,
    'decoder_{rest}': _DECODER,
}
_HEADS = {name + '.{rest}': name + '.{rest}' for name in ('neck', 'decode_head', 'auxiliary_head')}
_DETECTOR = {name + '.{rest}': name + '.{rest}' for name in ('neck', 'rpn_head', 'roi_head')}
_SEGMENT_ANYTHING = Drop("Segment Anything's own neck")


def vitae_repository(prefix: str, table: Dict[str, str]) -> Dict[str, str]:
    """A backbone of that repository with the pyramid inside it, and the FPN and heads after it."""
    pyramid = {prefix + theirs: ours for theirs, ours in VITAE_PYRAMID.items()}
    return {**backbone_under(prefix, table), **pyramid, **(_DETECTOR if prefix else {})}


def _layout(source, signature, table, finish=finish) -> Layout:
    return Layout('plainvit', source, signature, table, backbone_cfg, finish)


LAYOUTS = [
    _layout(
        'detectron2',
        ('backbone.net.blocks.0.attn.qkv.weight',),
        {**backbone_under('backbone.net.', DETECTRON2), **_detectron2_pyramid('backbone.'), **heads(norm='ln')},
    ),
    _layout(
        'detectron2',
        ('net.blocks.0.attn.qkv.weight',),
        {**backbone_under('net.', DETECTRON2), **_detectron2_pyramid('')},
    ),
    _layout('huggingface', ('encoder.layer.0.attention.qkv.weight',), backbone_under('', HUGGING_FACE)),
    *(
        _layout(
            'vitae-repository',
            (prefix + 'blocks.0.attn.rel_pos_h', prefix + 'fpn1.0.weight'),
            vitae_repository(prefix, VITAE_REPO),
            fold_scale,
        )
        for prefix in ('backbone.', '')
    ),
    _layout(
        'mmpretrain',
        ('backbone.layers.0.attn.qkv.weight', 'backbone.layers.0.ln1.weight'),
        {
            **backbone_under('backbone.', MMPRETRAIN),
            'head.layers.head.{leaf}': 'head.fc.{leaf}',
            'head.layers.pre_logits.{leaf}': _CLASSIFIER,
        },
    ),
    _layout('mmpretrain', ('layers.0.attn.qkv.weight', 'layers.0.ln1.weight'), backbone_under('', MMPRETRAIN)),
    # The bare form comes first: it is what MMSegmentation's init_cfg loads, and so what we write.
    _layout('mmseg', ('layers.0.attn.attn.in_proj_weight',), backbone_under('', MMSEG), finish_mmseg),
    _layout(
        'mmseg',
        ('backbone.layers.0.attn.attn.in_proj_weight',),
        {**backbone_under('backbone.', MMSEG), **_HEADS},
        finish_mmseg,
    ),
    _layout(
        'timm-sam',
        ('patch_embed.proj.weight', 'blocks.0.attn.rel_pos_h'),
        {
            **backbone_under('', {**_STEM, **_BLOCKS, **RELATIVE}),
            'neck.{rest}': _SEGMENT_ANYTHING,
            'head.{rest}': _SEGMENT_ANYTHING,
        },
    ),
    # DeiT's and MAE's checkpoints are spelled as timm's.
    _layout('timm', ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'), _TIMM),
    # Ours, as written by a toolbox around the backbone, and bare.
    _layout(
        'mmvitzoo',
        ('backbone.stem.projection.weight', 'backbone.blocks.0.attn.qkv.weight'),
        {'{rest}': '{rest}'},
        None,
    ),
    _layout('mmvitzoo', ('stem.projection.weight', 'blocks.0.attn.qkv.weight'), {'{rest}': 'backbone.{rest}'}, None),
]
