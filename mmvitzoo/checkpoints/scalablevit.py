"""Layouts of ScalableViT checkpoints."""

from typing import Any, Dict

from mmengine.registry import MODELS
from torch import Tensor

from .layout import Layout, backbone_under

_BLOCK = 'stages.{s}.{b}'
_LINEARS = ('qkv', 'q', 'k', 'v', 'kv', 'proj')
OFFICIAL = {
    'patch_embeds.{s}.proj.{leaf}': 'embeds.{s}.projection.{leaf}',
    'patch_embeds.{s}.norm.{leaf}': 'embeds.{s}.norm.{leaf}',
    'pos_block.{s}.proj.0.{leaf}': 'positions.{s}.{leaf}',
    f'{_BLOCK}.attn.lim_func.{{leaf}}': f'{_BLOCK}.attn.interact.{{leaf}}',
    f'{_BLOCK}.attn.norm_act.0.{{leaf}}': f'{_BLOCK}.attn.norm.{{leaf}}',
    **{f'{_BLOCK}.attn.{name}.{{leaf}}': f'{_BLOCK}.attn.{name}.{{leaf}}' for name in _LINEARS},
    f'{_BLOCK}.attn.reduction.{{i}}.{{leaf}}': f'{_BLOCK}.attn.reduction.{{i}}.{{leaf}}',
    f'{_BLOCK}.norm{{i}}.{{leaf}}': f'{_BLOCK}.norm{{i}}.{{leaf}}',
    f'{_BLOCK}.mlp.fc{{i}}.{{leaf}}': f'{_BLOCK}.mlp.fc{{i}}.{{leaf}}',
    'norm.{leaf}': 'norm3.{leaf}',
}
# The authors' head of several layers, in the names of MMPretrain's StackedLinearClsHead, or of one.
HEAD = {
    'head.0.{leaf}': 'head.layers.0.fc.{leaf}',
    'head.1.{leaf}': 'head.layers.0.norm.{leaf}',
    'head.3.{leaf}': 'head.layers.1.fc.{leaf}',
    'head.{leaf}': 'head.fc.{leaf}',
}


def backbone_cfg(backbone: Dict[str, Tensor]) -> Dict[str, Any]:
    """Config of the ScalableViT whose weights these are, in our names.

    Shapes do not tell the windows, which are of 7 tokens, and of a variant that is not published
    neither the heads, which have 32 channels or a little more, nor the channel ratio of a map that is
    not reduced, which is 1.
    """
    zoo = MODELS.get('ScalableViT').arch_zoo
    arch: Dict[str, tuple] = dict.fromkeys(next(iter(zoo.values())), ())
    stage = 0
    while f'embeds.{stage}.norm.weight' in backbone:
        dim = len(backbone[f'embeds.{stage}.norm.weight'])
        blocks = 0
        while f'stages.{stage}.{blocks}.norm1.weight' in backbone:
            blocks += 1
        arch['embed_dims'] += (dim,)
        arch['num_layers'] += (blocks,)
        kernel = backbone.get(f'stages.{stage}.1.attn.reduction.0.weight')
        arch['spatial_ratios'] += (1 if kernel is None else kernel.shape[-1],)
        width = len(backbone[f'stages.{stage}.1.attn.q.weight']) if kernel is not None else dim
        arch['channel_ratios'] += (width / dim,)
        heads = range(max(dim // 32, 1), 0, -1)
        arch['num_heads'] += (next(n for n in heads if dim % n == width % n == 0),)
        stage += 1
    # A backbone that returns only early maps has no later stages.
    variants = {name: {key: values[:stage] for key, values in variant.items()} for name, variant in zoo.items()}
    name = next((name for name, variant in variants.items() if variant == arch), None)
    if stage < 4 and name is None:
        raise KeyError(f'stages.{stage}')
    cfg: Dict[str, Any] = dict(type='ScalableViT', arch=name or arch)
    out_indices = tuple(i for i in range(4) if f'norm{i}.weight' in backbone)
    return cfg if out_indices == (0, 1, 2, 3) else dict(cfg, out_indices=out_indices)


def _layout(source, signature, table) -> Layout:
    return Layout('scalablevit', source, (signature,), table, backbone_cfg)


LAYOUTS = [
    _layout('official', 'stages.0.0.attn.lim_func.weight', {**backbone_under('', OFFICIAL), **HEAD}),
    # Ours, as written by a toolbox around the backbone, and bare.
    _layout('mmvitzoo', 'backbone.stages.0.0.attn.interact.weight', {'{rest}': '{rest}'}),
    _layout('mmvitzoo', 'stages.0.0.attn.interact.weight', {'{rest}': 'backbone.{rest}'}),
]
