"""Layouts of Perception Encoder, RoPE-ViT and timm's own models with rotary positions in timm; all are PlainViT."""

import math
from functools import partial
from typing import Dict

import torch
from torch import Tensor

from ...models.backbones.base import weight_shape
from .layout import Dropped, Layout, backbone_under, unchanged
from .vit import POOLING, TIMM, drop_classifier
from .vit_steps import (
    add_cls_position,
    add_patch_bias,
    drop_patch_bias,
    drop_rotary_buffers,
    export_steps,
    join_biases,
    merge_cls_position,
    split_biases,
    steps,
)

_TABLE = {
    **backbone_under(
        '',
        {
            **TIMM,
            **unchanged('reg_token', 'norm_pre.{leaf}', 'rope.freqs'),
            'blocks.{b}.attn.q_bias': 'blocks.{b}.attn.q_bias',
            'blocks.{b}.attn.v_bias': 'blocks.{b}.attn.v_bias',
            'blocks.{b}.gamma_{i}': 'blocks.{b}.ls{i}.gamma',
        },
    ),
    'head.{leaf}': 'head.fc.{leaf}',
    'attn_pool.{rest}': POOLING,
    'fc_norm.{leaf}': Dropped('belongs to a kind of classifier head that is not converted'),
}


def pretrained_grid(state_dict: Dict[str, Tensor]) -> int:
    """Returns the side of the grid of pretraining: that of the positions, or 16 for timm's models, which have none."""
    if 'backbone.pos_embed' not in state_dict:
        return 16
    num_patches = weight_shape(state_dict, 'backbone.pos_embed', 3)[1] - ('backbone.cls_token' in state_dict)
    side = math.isqrt(max(num_patches, 0))
    if not side or side**2 != num_patches:
        raise ValueError(f'{num_patches} positions of backbone.pos_embed fill no square')
    return side


def pretrained_size(state_dict: Dict[str, Tensor]) -> int:
    """Returns the side in pixels of the images of pretraining."""
    return pretrained_grid(state_dict) * weight_shape(state_dict, 'backbone.patch_embed.proj.weight', 4)[3]


def add_grid(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Adds the grid that rotary coordinates are scaled to."""
    state_dict['backbone.rope.grid'] = torch.full((2,), float(pretrained_grid(state_dict)))


_layout = partial(Layout, 'plainvit', 'PlainViT', table=_TABLE)
_PATCH, _QKV = 'patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'

LAYOUTS = [
    # The core models have a pooling head; those for language and dense features have no norm after the blocks.
    *(
        _layout(
            'timm-pe',
            (_PATCH, _QKV, 'pos_embed', 'norm_pre.weight', *head),
            postprocess=steps(add_patch_bias, add_grid, drop_classifier),
            preprocess_export=export_steps(drop_rotary_buffers, drop_patch_bias),
            metadata=lambda state_dict: dict(
                rope_type='pe', img_size=pretrained_size(state_dict), norm_eps=1e-5, interpolate_antialias=True
            ),
            assumed=('rope_type', 'img_size'),
            square=True,
            absent=('patch_embed.proj.bias', *absent),
        )
        for head, absent in ((('attn_pool.latent',), ()), ((), ('norm.weight', 'fc_norm.weight')))
    ),
    _layout(
        'timm-sbb',
        (_PATCH, _QKV, 'reg_token', 'blocks.0.gamma_1'),
        postprocess=steps(join_biases, add_grid, drop_classifier),
        preprocess_export=export_steps(drop_rotary_buffers, split_biases),
        metadata=lambda state_dict: dict(rope_type='sbb', img_size=pretrained_size(state_dict)),
        assumed=('rope_type', 'img_size'),
        absent=('cls_token', 'pos_embed'),
    ),
    # With axial positions and a table of positions, these have the very keys of the authors' DeiT III.
    *(
        _layout(
            'timm-rope-vit',
            (_PATCH, _QKV, 'cls_token', 'blocks.0.gamma_1', 'blocks.0.attn.qkv.bias', *freqs),
            postprocess=steps(add_cls_position, drop_classifier),
            preprocess_export=export_steps(drop_rotary_buffers, merge_cls_position),
            metadata=metadata,
            assumed=assumed,
            square=True,
            absent=absent,
        )
        for metadata, freqs, assumed, absent in (
            (dict(rope_type='mixed', interpolate_antialias=True), ('rope.freqs',), (), ()),
            (dict(rope_type='axial'), (), ('rope_type',), ('pos_embed', 'reg_token')),
        )
    ),
]
