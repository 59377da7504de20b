"""Layouts of ScalableViT checkpoints."""

from functools import partial

from .layout import Layout, backbone_under, unchanged

_BLOCK = 'stages.{s}.{b}'
OFFICIAL = {
    **unchanged('patch_embeds.{s}.proj.{leaf}', 'patch_embeds.{s}.norm.{leaf}'),
    'pos_block.{s}.proj.0.{leaf}': 'pos_embeds.{s}.{leaf}',
    f'{_BLOCK}.attn.lim_func.{{leaf}}': f'{_BLOCK}.attn.local_interaction.{{leaf}}',
    f'{_BLOCK}.attn.norm_act.0.{{leaf}}': f'{_BLOCK}.attn.norm.{{leaf}}',
    **unchanged(*(f'{_BLOCK}.attn.{name}.{{leaf}}' for name in ('qkv', 'q', 'k', 'v', 'kv', 'proj', 'reduction.{i}'))),
    **unchanged(f'{_BLOCK}.norm{{i}}.{{leaf}}', f'{_BLOCK}.mlp.fc{{i}}.{{leaf}}'),
    'norm.{leaf}': 'norm3.{leaf}',
}
# The authors' head of several layers, in the names of MMPretrain's StackedLinearClsHead, or their single linear layer.
HEAD = {
    'head.0.{leaf}': 'head.layers.0.fc.{leaf}',
    'head.1.{leaf}': 'head.layers.0.norm.{leaf}',
    'head.3.{leaf}': 'head.layers.1.fc.{leaf}',
    'head.{leaf}': 'head.fc.{leaf}',
}
_SIGNATURE = 'stages.0.0.attn.local_interaction.weight'

_layout = partial(Layout, 'scalablevit', 'ScalableViT')

LAYOUTS = [
    _layout('official', ('stages.0.0.attn.lim_func.weight',), {**backbone_under('', OFFICIAL), **HEAD}),
    # This package's: of a whole model, and of a backbone alone.
    _layout('mmvitzoo', ('backbone.' + _SIGNATURE,), unchanged('{rest}')),
    _layout('mmvitzoo', (_SIGNATURE,), {'{rest}': 'backbone.{rest}'}),
]
