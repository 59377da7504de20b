"""Layouts of ViTAE checkpoints."""

from typing import Any, Dict

import torch
from mmengine.registry import MODELS
from torch import Tensor

from .layout import Drop, Layout
from .vit import VITAE_REPO, attention_areas, nearest_grid, plain_arch, vitae_repository
from .vit import finish as finish_positions

BASE = {
    **VITAE_REPO,
    # Keys have no bias in global blocks, and queries and values have one each.
    'blocks.{b}.attn.q_bias': 'blocks.{b}.attn.q_bias',
    'blocks.{b}.attn.v_bias': 'blocks.{b}.attn.v_bias',
    'blocks.{b}.PCM.{i}.{leaf}': 'blocks.{b}.pcm.{i}.{leaf}',
}
SMALL = {
    'layers.{s}.RC.PRM.convs.{i}.0.{leaf}': 'stem.{s}.pyramid.{i}.{leaf}',
    'layers.{s}.RC.PCM.{i}.{leaf}': 'stem.{s}.pcm.{i}.{leaf}',
    'layers.{s}.RC.attn.w': 'stem.{s}.attn.directions',
    'layers.{s}.RC.attn.kqv.{leaf}': 'stem.{s}.attn.kqv.{leaf}',
    'layers.{s}.RC.attn.proj.{leaf}': 'stem.{s}.attn.proj.{leaf}',
    'layers.{s}.RC.attn.norm1.{leaf}': 'stem.{s}.attn.norm.{leaf}',
    'layers.{s}.RC.attn.norm2.{leaf}': 'stem.{s}.norm.{leaf}',
    'layers.{s}.RC.attn.mlp.0.{leaf}': 'stem.{s}.mlp.fc1.{leaf}',
    'layers.{s}.RC.attn.mlp.2.{leaf}': 'stem.{s}.mlp.fc2.{leaf}',
    **{key.replace('blocks.', 'layers.2.NC.'): ours for key, ours in BASE.items() if key.startswith('blocks.')},
    'norm.{leaf}': 'norm.{leaf}',
}


# A spelling of ViTAE-B's classifier that has cells instead of blocks.
BASE_IN_CELLS = {
    'layers.0.RC.PRM.proj.{leaf}': 'stem.projection.{leaf}',
    'layers.0.RC.pos_embed': 'stem.pos_embed',
    **{key: ours for key, ours in SMALL.items() if not key.startswith('layers.{s}')},
}


def finish_base(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Cuts positions that have no token, and gives keys a bias of zero."""
    finish_positions(state_dict, dropped)
    for key in [key for key in state_dict if key.endswith('.q_bias')]:
        block = key[: -len('q_bias')]
        q, v = state_dict.pop(key), state_dict.pop(block + 'v_bias')
        if block + 'qkv.bias' in state_dict:
            raise ValueError(f'{block}qkv.bias is there beside {key}')
        state_dict[block + 'qkv.bias'] = torch.cat([q, torch.zeros_like(q), v])


def backbone_cfg(backbone: Dict[str, Tensor]) -> Dict[str, Any]:
    """Config of the ViTAE whose weights these are, in our names.

    Relative positions of one size in every block do not tell which blocks are global: four evenly
    spaced ones are assumed, if no published variant fits.
    """
    zoo = MODELS.get('ViTAE').arch_zoo
    arch: Dict[str, Any] = plain_arch(backbone)
    arch['pcm_convs'] = 2 + ('blocks.0.pcm.6.weight' in backbone)
    cells = 'stem.0.pyramid.0.weight' in backbone
    arch['reduction_dims'] = tuple(len(backbone[f'stem.{s}.norm.weight']) for s in (0, 1)) if cells else None
    name = next((name for name, variant in zoo.items() if {**variant, **arch} == variant), None)
    cfg = dict(type='ViTAE', arch=name, final_norm='norm.weight' in backbone)
    grid = None if cells else nearest_grid(backbone['stem.pos_embed'].shape[1])
    if 'blocks.0.attn.rel_pos_h' in backbone:
        window, global_blocks, rel_grid = attention_areas(backbone, arch['num_layers'], evenly=True)
        cfg['window_size'] = window
        if name is None or (rel_grid != (window, window) and zoo[name]['global_attn_indexes'] != global_blocks):
            cfg['arch'] = dict(arch, global_attn_indexes=global_blocks)
        grid = rel_grid or grid
    elif name is None:  # a classifier
        cfg['arch'] = dict(arch, global_attn_indexes=())
    if grid:
        cfg['img_size'] = tuple(16 * side for side in grid)
    return cfg


_CLASSIFIER = {
    'cls_token': Drop('the model runs without a class token'),
    'head.{leaf}': Drop('classifies the class token, which the model runs without'),
}
_POSITIONS = {'pos_embed': Drop('the published detector has no absolute positions')}


def _layouts(prefix: str):
    base, small = (vitae_repository(prefix, table) for table in (BASE, SMALL))
    source = 'vitae-repository'
    extra = {prefix + key: reason for key, reason in _CLASSIFIER.items()}
    yield Layout('vitae', source, (prefix + 'blocks.0.PCM.0.weight',), {**base, **extra}, backbone_cfg, finish_base)
    cells = {**vitae_repository(prefix, BASE_IN_CELLS), **extra}
    cells[prefix + 'layers.0.RC.cls_token'] = _CLASSIFIER['cls_token']
    yield Layout('vitae', source, (prefix + 'layers.0.RC.PRM.proj.weight',), cells, backbone_cfg, finish_base)
    extra.update({prefix + key: reason for key, reason in _POSITIONS.items()})
    yield Layout('vitae', source, (prefix + 'layers.0.RC.PCM.0.weight',), {**small, **extra}, backbone_cfg)


LAYOUTS = [
    *_layouts('backbone.'),
    *_layouts(''),
    # Ours, as written by a toolbox around the backbone, and bare.
    Layout('vitae', 'mmvitzoo', ('backbone.blocks.0.pcm.0.weight',), {'{rest}': '{rest}'}, backbone_cfg),
    Layout('vitae', 'mmvitzoo', ('blocks.0.pcm.0.weight',), {'{rest}': 'backbone.{rest}'}, backbone_cfg),
]
