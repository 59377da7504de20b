"""Layouts of MPViT checkpoints."""

from functools import partial

from .detectron2 import RETINANET, fpn, heads, reorder_anchors, restore_anchors
from .layout import Layout, backbone_under, unchanged

_STAGE = 'mhca_stages.{s}'
_PATH = 'mhca_stages.{s}.mhca_blks.{p}'
_BLOCK = 'mhca_stages.{s}.mhca_blks.{p}.MHCA_layers.{b}'
_PATCH = 'patch_embed_stages.{s}.patch_embeds.{i}.patch_conv'
_OUR_PATCH = 'stages.{s}.patch_embeds.{i}'
_OUR_PATH = 'stages.{s}.paths.{p}'
_OUR_BLOCK = 'stages.{s}.paths.{p}.blocks.{b}'

# The blocks of a path share their position encodings, which the authors' checkpoints repeat in each block.
BACKBONE = {
    **unchanged('stem.{i}.conv.{leaf}', 'stem.{i}.bn.{leaf}'),
    f'{_PATCH}.dwconv.{{leaf}}': f'{_OUR_PATCH}.depthwise_conv.conv.{{leaf}}',
    f'{_PATCH}.pwconv.{{leaf}}': f'{_OUR_PATCH}.pointwise_conv.conv.{{leaf}}',
    f'{_PATCH}.bn.{{leaf}}': f'{_OUR_PATCH}.pointwise_conv.bn.{{leaf}}',
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
_SIGNATURE = 'mhca_stages.0.aggregate.conv.weight'
_OUR_SIGNATURE = 'stages.0.paths.0.crpe.convs.0.weight'
_DETECTRON2 = 'backbone.bottom_up.backbone.'

_layout = partial(Layout, 'mpvit', 'MPViT')

LAYOUTS = [
    _layout('official', (_SIGNATURE,), {**backbone_under('', BACKBONE), 'cls_head.cls.{leaf}': 'head.fc.{leaf}'}),
    _layout(
        'detectron2',
        (_DETECTRON2 + _SIGNATURE, 'head.cls_score.weight'),
        {**backbone_under(_DETECTRON2, BACKBONE), **RETINANET},
        reorder_anchors,
        restore_anchors,
    ),
    _layout(
        'detectron2',
        (_DETECTRON2 + _SIGNATURE,),
        {**backbone_under(_DETECTRON2, BACKBONE), **fpn(2), **heads(norm='bn')},
    ),
    _layout(
        'mmseg0',
        ('backbone.' + _SIGNATURE,),
        {**backbone_under('backbone.', BACKBONE), **unchanged('decode_head.{rest}', 'auxiliary_head.{rest}')},
    ),
    # This package's: of a whole model, and of a backbone alone.
    _layout('mmvitzoo', ('backbone.' + _OUR_SIGNATURE,), unchanged('{rest}')),
    _layout('mmvitzoo', (_OUR_SIGNATURE,), {'{rest}': 'backbone.{rest}'}),
]
