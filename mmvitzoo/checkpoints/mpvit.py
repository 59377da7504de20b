"""Layouts of MPViT checkpoints."""

from typing import Any, Dict

from mmengine.registry import MODELS
from torch import Tensor

from .detectron2 import RETINANET, fpn, heads, reorder_anchors
from .layout import Layout, backbone_under

_STAGE = 'mhca_stages.{s}'
_PATH = 'mhca_stages.{s}.mhca_blks.{p}'
_BLOCK = 'mhca_stages.{s}.mhca_blks.{p}.MHCA_layers.{b}'
_UNIT = 'patch_embed_stages.{s}.patch_embeds.{i}.patch_conv'
_OUR_UNIT = 'stages.{s}.patch_embeds.{i}'
_OUR_PATH = 'stages.{s}.paths.{p}'
_OUR_BLOCK = 'stages.{s}.paths.{p}.blocks.{b}'

# Key of the authors' backbone -> ours. The blocks of a path share their position encodings,
# which the authors' checkpoints repeat in each block.
BACKBONE = {
    'stem.{i}.conv.{leaf}': 'stem.{i}.conv.{leaf}',
    'stem.{i}.bn.{leaf}': 'stem.{i}.bn.{leaf}',
    f'{_UNIT}.dwconv.{{leaf}}': f'{_OUR_UNIT}.depthwise_conv.conv.{{leaf}}',
    f'{_UNIT}.pwconv.{{leaf}}': f'{_OUR_UNIT}.pointwise_conv.conv.{{leaf}}',
    f'{_UNIT}.bn.{{leaf}}': f'{_OUR_UNIT}.pointwise_conv.bn.{{leaf}}',
    f'{_PATH}.cpe.proj.{{leaf}}': f'{_OUR_PATH}.cpe.{{leaf}}',
    f'{_BLOCK}.cpe.proj.{{leaf}}': f'{_OUR_PATH}.cpe.{{leaf}}',
    f'{_PATH}.crpe.conv_list.{{i}}.{{leaf}}': f'{_OUR_PATH}.crpe.convs.{{i}}.{{leaf}}',
    f'{_BLOCK}.crpe.conv_list.{{i}}.{{leaf}}': f'{_OUR_PATH}.crpe.convs.{{i}}.{{leaf}}',
    f'{_BLOCK}.factoratt_crpe.crpe.conv_list.{{i}}.{{leaf}}': f'{_OUR_PATH}.crpe.convs.{{i}}.{{leaf}}',
    f'{_BLOCK}.factoratt_crpe.qkv.{{leaf}}': f'{_OUR_BLOCK}.attn.qkv.{{leaf}}',
    f'{_BLOCK}.factoratt_crpe.proj.{{leaf}}': f'{_OUR_BLOCK}.attn.proj.{{leaf}}',
    f'{_BLOCK}.mlp.fc{{i}}.{{leaf}}': f'{_OUR_BLOCK}.mlp.fc{{i}}.{{leaf}}',
    f'{_BLOCK}.norm{{i}}.{{leaf}}': f'{_OUR_BLOCK}.norm{{i}}.{{leaf}}',
    f'{_STAGE}.InvRes.conv1.{{rest}}': 'stages.{s}.local.0.{rest}',
    f'{_STAGE}.InvRes.dwconv.{{leaf}}': 'stages.{s}.local.1.conv.{leaf}',
    f'{_STAGE}.InvRes.norm.{{leaf}}': 'stages.{s}.local.1.bn.{leaf}',
    f'{_STAGE}.InvRes.conv2.{{rest}}': 'stages.{s}.local.2.{rest}',
    f'{_STAGE}.aggregate.{{rest}}': 'stages.{s}.aggregate.{rest}',
}
SIGNATURE = 'mhca_stages.0.aggregate.conv.weight'
OUR_SIGNATURE = 'stages.0.paths.0.crpe.convs.0.weight'


def backbone_cfg(backbone: Dict[str, Tensor]) -> Dict[str, Any]:
    """Config of the MPViT whose weights these are, in our names.

    Shapes do not tell which kind of norm was trained: BatchNorm is assumed, as published.
    """
    zoo = MODELS.get('MPViT').arch_zoo

    def count(template: str) -> int:
        n = 0
        while template.format(n) in backbone:
            n += 1
        return n

    arch: Dict[str, tuple] = dict.fromkeys(zoo['tiny'], ())
    num_stages = count('stages.{}.paths.0.cpe.weight')
    for s in range(num_stages):
        hidden, dim = backbone[f'stages.{s}.paths.0.blocks.0.mlp.fc1.weight'].shape
        arch['num_paths'] += (count(f'stages.{s}.paths.{{}}.cpe.weight'),)
        arch['num_layers'] += (count(f'stages.{s}.paths.0.blocks.{{}}.norm1.weight'),)
        arch['embed_dims'] += (dim,)
        arch['mlp_ratios'] += (hidden / dim,)
    # A backbone that returns only early maps has no later stages.
    variants = {name: {key: values[:num_stages] for key, values in variant.items()} for name, variant in zoo.items()}
    name = next((name for name, variant in variants.items() if variant == arch), None)
    if num_stages == 4:
        return dict(type='MPViT', arch=name or arch)
    if name is None:
        raise KeyError(f'stages.{num_stages}')
    return dict(type='MPViT', arch=name, out_indices=tuple(range(num_stages)))


_DETECTRON2 = 'backbone.bottom_up.backbone.'

LAYOUTS = [
    Layout(
        'mpvit',
        'official',
        (SIGNATURE,),
        {**backbone_under('', BACKBONE), 'cls_head.cls.{leaf}': 'head.fc.{leaf}'},
        backbone_cfg,
    ),
    Layout(
        'mpvit',
        'detectron2',
        (_DETECTRON2 + SIGNATURE, 'head.cls_score.weight'),
        {**backbone_under(_DETECTRON2, BACKBONE), **RETINANET},
        backbone_cfg,
        reorder_anchors,
    ),
    Layout(
        'mpvit',
        'detectron2',
        (_DETECTRON2 + SIGNATURE,),
        {**backbone_under(_DETECTRON2, BACKBONE), **fpn(2), **heads(norm='bn')},
        backbone_cfg,
    ),
    Layout(
        'mpvit',
        'mmseg0',
        ('backbone.' + SIGNATURE,),
        {
            **backbone_under('backbone.', BACKBONE),
            'decode_head.{rest}': 'decode_head.{rest}',
            'auxiliary_head.{rest}': 'auxiliary_head.{rest}',
        },
        backbone_cfg,
    ),
    # Ours, as written by a toolbox around the backbone, and bare.
    Layout('mpvit', 'mmvitzoo', ('backbone.' + OUR_SIGNATURE,), {'{rest}': '{rest}'}, backbone_cfg),
    Layout('mpvit', 'mmvitzoo', (OUR_SIGNATURE,), {'{rest}': 'backbone.{rest}'}, backbone_cfg),
]
