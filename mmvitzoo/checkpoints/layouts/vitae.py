"""Layouts of ViTAE checkpoints."""

from functools import partial
from typing import Dict, List

from torch import Tensor

from .layout import Dropped, Layout, unchanged
from .vit import VITAE_REPOSITORY, drop_cls_position, vitae_repository
from .vit_steps import join_biases

BASE = {
    **VITAE_REPOSITORY,
    # In global blocks queries and values have biases of their own, and keys have none; see join_biases.
    **unchanged('blocks.{b}.attn.q_bias', 'blocks.{b}.attn.v_bias'),
    'blocks.{b}.PCM.{i}.{leaf}': 'blocks.{b}.pcm.{i}.{leaf}',
}
_CELL, _OUR_CELL = 'layers.{s}.RC', 'patch_embed.{s}'
SMALL = {
    f'{_CELL}.PRM.convs.{{i}}.0.{{leaf}}': f'{_OUR_CELL}.prm.{{i}}.{{leaf}}',
    f'{_CELL}.PCM.{{i}}.{{leaf}}': f'{_OUR_CELL}.pcm.{{i}}.{{leaf}}',
    f'{_CELL}.attn.w': f'{_OUR_CELL}.attn.random_features',
    f'{_CELL}.attn.kqv.{{leaf}}': f'{_OUR_CELL}.attn.kqv.{{leaf}}',
    f'{_CELL}.attn.proj.{{leaf}}': f'{_OUR_CELL}.attn.proj.{{leaf}}',
    f'{_CELL}.attn.norm1.{{leaf}}': f'{_OUR_CELL}.attn.norm.{{leaf}}',
    f'{_CELL}.attn.norm2.{{leaf}}': f'{_OUR_CELL}.norm.{{leaf}}',
    f'{_CELL}.attn.mlp.0.{{leaf}}': f'{_OUR_CELL}.mlp.fc1.{{leaf}}',
    f'{_CELL}.attn.mlp.2.{{leaf}}': f'{_OUR_CELL}.mlp.fc2.{{leaf}}',
    **{key.replace('blocks.', 'layers.2.NC.'): ours for key, ours in BASE.items() if key.startswith('blocks.')},
    **unchanged('norm.{leaf}'),
}
# The classifier ViTAE-B is also published with names of cells instead of blocks.
BASE_IN_CELLS = {
    'layers.0.RC.PRM.proj.{leaf}': 'patch_embed.proj.{leaf}',
    'layers.0.RC.pos_embed': 'pos_embed',
    **{key: ours for key, ours in SMALL.items() if not key.startswith(_CELL)},
}
_CLASSIFIER = {
    'cls_token': Dropped('the model has no class token'),
    'head.{leaf}': Dropped('classifies the class token, which the model does not have'),
}


def postprocess_base(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Joins biases, and drops the position of a class token."""
    join_biases(state_dict, dropped)
    drop_cls_position(state_dict, dropped)


_layout = partial(Layout, 'vitae', 'ViTAE')


def _repository_layouts(prefix: str) -> List[Layout]:
    classifier = {prefix + key: reason for key, reason in _CLASSIFIER.items()}
    base = {**vitae_repository(prefix, BASE), **classifier}
    in_cells = {**vitae_repository(prefix, BASE_IN_CELLS), **classifier}
    in_cells[prefix + 'layers.0.RC.cls_token'] = _CLASSIFIER['cls_token']
    small = {**vitae_repository(prefix, SMALL), **classifier}
    small[prefix + 'pos_embed'] = Dropped('the published detector has no absolute positions')
    return [
        _layout('vitae-repository', (prefix + 'blocks.0.PCM.0.weight',), base, postprocess_base),
        _layout('vitae-repository', (prefix + 'layers.0.RC.PRM.proj.weight',), in_cells, postprocess_base),
        _layout('vitae-repository', (prefix + 'layers.0.RC.PCM.0.weight',), small, join_biases),
    ]


LAYOUTS = [
    *_repository_layouts('backbone.'),
    *_repository_layouts(''),
    # This package's: of a whole model, and of a backbone alone.
    _layout('mmvitzoo', ('backbone.blocks.0.pcm.0.weight',), unchanged('{rest}')),
    _layout('mmvitzoo', ('blocks.0.pcm.0.weight',), {'{rest}': 'backbone.{rest}'}),
]
