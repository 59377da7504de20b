"""Layouts of plain ViT and ViTDet checkpoints. This package has timm's names."""

import math
from functools import partial
from typing import Dict, Sequence

from torch import Tensor

from ...models.backbones.base import weight_shape
from ..reading import CheckpointError
from .detectron2 import heads
from .layout import Dropped, Layout, Unsupported, backbone_under, part_under, unchanged
from .vit_steps import (
    add_cls_position,
    add_patch_bias,
    drop_patch_bias,
    export_steps,
    flatten_linears,
    heads_of_flax,
    join_qkv,
    merge_cls_position,
    metadata_of_timm,
    rename_gated,
    restore_gated,
    steps,
)

LEAVES = ('.weight', '.bias')
_BLOCKS = unchanged(
    'blocks.{b}.norm{i}.{leaf}',
    'blocks.{b}.attn.qkv.{leaf}',
    'blocks.{b}.attn.proj.{leaf}',
    'blocks.{b}.mlp.fc{i}.{leaf}',
)
_EMBEDDING = unchanged('pos_embed', 'patch_embed.proj.{leaf}')
_NORM = unchanged('norm.{leaf}')
_REL_POS = unchanged('blocks.{b}.attn.rel_pos_h', 'blocks.{b}.attn.rel_pos_w')
_OUR_RESIDUAL = unchanged('blocks.{b}.residual.{i}.{leaf}')
_OPTIONS = unchanged(
    'norm_pre.{leaf}', 'reg_token', 'rope.periods', 'rope.grid', 'rope.freqs', 'blocks.{b}.ls{i}.gamma'
)
_RESIDUAL = {
    f'blocks.{{b}}.residual.{part}{i + 1}.{{leaf}}': f'blocks.{{b}}.residual.{3 * i + offset}.{{leaf}}'
    for i in range(3)
    for offset, part in enumerate(('conv', 'norm'))
}
TIMM = {**_EMBEDDING, **unchanged('cls_token'), **_BLOCKS, **_NORM}
VITAE_REPOSITORY = {**_EMBEDDING, **_BLOCKS, **_REL_POS, **_NORM}
DETECTRON2 = {**_EMBEDDING, **_BLOCKS, **_REL_POS, **_RESIDUAL}
OURS = {
    **TIMM,
    **_REL_POS,
    **_OUR_RESIDUAL,
    **unchanged('fc_norm.{leaf}'),
    **_OPTIONS,
}
_DISTILLATION = Dropped('PlainViT has no distillation token; its position and its head are dropped as well')
_CLASSIFIER = Dropped('belongs to a kind of classifier head that is not converted')
DECODER = Dropped('belongs to the decoder of masked autoencoding')
POOLING = Dropped('belongs to a pooling layer after the blocks')
TEXT_TOWER = Dropped('belongs to the text encoder, or joins it with the image encoder')
_SAM_NECK = Dropped("Segment Anything's own neck")
# timm's models with all options of PlainViT, also this package's backbones alone. Heads are beside the backbone.
TIMM_OPTIONS = {
    **TIMM,
    **_OPTIONS,
}
TIMM_HEADS = {
    'head.{leaf}': 'head.fc.{leaf}',
    'head_dist.{leaf}': _DISTILLATION,
    'dist_token': _DISTILLATION,
    'pre_logits.{rest}': _CLASSIFIER,
    'fc_norm.{leaf}': _CLASSIFIER,
    'attn_pool.{rest}': POOLING,
    'mask_token': DECODER,
    'decoder_{rest}': DECODER,
}
TORCHVISION = {
    'class_token': 'cls_token',
    'encoder.pos_embedding': 'pos_embed',
    'conv_proj.{leaf}': 'patch_embed.proj.{leaf}',
    'encoder.layers.encoder_layer_{b}.ln_{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    'encoder.layers.encoder_layer_{b}.self_attention.in_proj_{leaf}': 'blocks.{b}.attn.qkv.{leaf}',
    'encoder.layers.encoder_layer_{b}.self_attention.out_proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'encoder.layers.encoder_layer_{b}.mlp.0.{leaf}': 'blocks.{b}.mlp.fc1.{leaf}',
    'encoder.layers.encoder_layer_{b}.mlp.3.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
    'encoder.layers.encoder_layer_{b}.mlp.linear_{i}.{leaf}': 'blocks.{b}.mlp.fc{i}.{leaf}',  # before 0.13
    'encoder.ln.{leaf}': 'norm.{leaf}',
}
_FLAX_LAYERS = {
    'MultiHeadDotProductAttention_1/query': 'attn.q',
    'MultiHeadDotProductAttention_1/key': 'attn.k',
    'MultiHeadDotProductAttention_1/value': 'attn.v',
    'MultiHeadDotProductAttention_1/out': 'attn.proj',
    'MlpBlock_3/Dense_0': 'mlp.fc1',
    'MlpBlock_3/Dense_1': 'mlp.fc2',
}
# Google's files for Flax.
GOOGLE = {
    'cls': 'cls_token',
    'Transformer/posembed_input/pos_embedding': 'pos_embed',
    'embedding/kernel': 'patch_embed.proj.weight',
    'embedding/bias': 'patch_embed.proj.bias',
    **{
        f'Transformer/encoderblock_{{b}}/{theirs}/{leaf}': f'blocks.{{b}}.{ours}.{our_leaf}'
        for theirs, ours in _FLAX_LAYERS.items()
        for leaf, our_leaf in (('kernel', 'weight'), ('bias', 'bias'))
    },
    **{
        f'Transformer/{theirs}/{leaf}': f'{ours}.{our_leaf}'
        for theirs, ours in (
            ('encoderblock_{b}/LayerNorm_0', 'blocks.{b}.norm1'),
            ('encoderblock_{b}/LayerNorm_2', 'blocks.{b}.norm2'),
            ('encoder_norm', 'norm'),
        )
        for leaf, our_leaf in (('scale', 'weight'), ('bias', 'bias'))
    },
}
# ViT, DeiT and ViT-MAE; transformers 5 has the names after the comment in memory.
HUGGING_FACE_VIT = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.distillation_token': _DISTILLATION,
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.mask_token': DECODER,
    'embeddings.patch_embeddings.projection.{leaf}': 'patch_embed.proj.{leaf}',
    'encoder.layer.{b}.layernorm_before.{leaf}': 'blocks.{b}.norm1.{leaf}',
    'encoder.layer.{b}.layernorm_after.{leaf}': 'blocks.{b}.norm2.{leaf}',
    'encoder.layer.{b}.attention.attention.query.{leaf}': 'blocks.{b}.attn.q.{leaf}',
    'encoder.layer.{b}.attention.attention.key.{leaf}': 'blocks.{b}.attn.k.{leaf}',
    'encoder.layer.{b}.attention.attention.value.{leaf}': 'blocks.{b}.attn.v.{leaf}',
    'encoder.layer.{b}.attention.output.dense.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'encoder.layer.{b}.intermediate.dense.{leaf}': 'blocks.{b}.mlp.fc1.{leaf}',
    'encoder.layer.{b}.output.dense.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
    'layernorm.{leaf}': 'norm.{leaf}',
    'pooler.dense.{leaf}': POOLING,
    # in memory
    'layers.{b}.layernorm_before.{leaf}': 'blocks.{b}.norm1.{leaf}',
    'layers.{b}.layernorm_after.{leaf}': 'blocks.{b}.norm2.{leaf}',
    'layers.{b}.attention.q_proj.{leaf}': 'blocks.{b}.attn.q.{leaf}',
    'layers.{b}.attention.k_proj.{leaf}': 'blocks.{b}.attn.k.{leaf}',
    'layers.{b}.attention.v_proj.{leaf}': 'blocks.{b}.attn.v.{leaf}',
    'layers.{b}.attention.o_proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'layers.{b}.mlp.fc{i}.{leaf}': 'blocks.{b}.mlp.fc{i}.{leaf}',
}
HUGGING_FACE = {
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.projection.{leaf}': 'patch_embed.proj.{leaf}',
    **{
        theirs.replace('blocks.', 'encoder.layer.').replace('.attn.', '.attention.'): ours
        for theirs, ours in {**_BLOCKS, **_REL_POS, **_RESIDUAL}.items()
    },
}
_OPENMMLAB = {
    **unchanged('cls_token', 'pos_embed'),
    'patch_embed.projection.{leaf}': 'patch_embed.proj.{leaf}',
    'layers.{b}.ln{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    'layers.{b}.ffn.layers.0.0.{leaf}': 'blocks.{b}.mlp.fc1.{leaf}',
    'layers.{b}.ffn.layers.1.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
    'ln1.{leaf}': 'norm.{leaf}',
    'ln2.{leaf}': 'fc_norm.{leaf}',
}
MMPRETRAIN = {
    **_OPENMMLAB,
    'layers.{b}.attn.qkv.{leaf}': 'blocks.{b}.attn.qkv.{leaf}',
    'layers.{b}.attn.proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    # DINOv2 and DeiT III
    'layers.{b}.attn.gamma1.weight': 'blocks.{b}.ls1.gamma',
    'layers.{b}.ffn.gamma2.weight': 'blocks.{b}.ls2.gamma',
    'layers.{b}.ffn.w12.{leaf}': 'blocks.{b}.mlp.w12.{leaf}',
    'layers.{b}.ffn.w3.{leaf}': 'blocks.{b}.mlp.w3.{leaf}',
}
MMSEG = {
    **_OPENMMLAB,
    'layers.{b}.attn.attn.in_proj_{leaf}': 'blocks.{b}.attn.qkv.{leaf}',
    'layers.{b}.attn.attn.out_proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
}

# The ViTAE authors' backbones contain the feature pyramid.
VITAE_PYRAMID = {
    'fpn1.0.{leaf}': 'neck.rescale.0.0.{leaf}',
    'fpn1.1.ln.{leaf}': 'neck.rescale.0.1.{leaf}',
    'fpn1.3.{leaf}': 'neck.rescale.0.3.{leaf}',
    'fpn2.0.{leaf}': 'neck.rescale.1.0.{leaf}',
}


def vitae_repository(prefix: str, table: Dict[str, str]) -> Dict[str, str]:
    """Returns the table of a backbone of the ViTAE authors with its pyramid and, under a prefix, FPN and heads."""
    pyramid = {prefix + theirs: ours for theirs, ours in VITAE_PYRAMID.items()}
    detector = unchanged('neck.{rest}', 'rpn_head.{rest}', 'roi_head.{rest}') if prefix else {}
    return {**backbone_under(prefix, table), **pyramid, **detector}


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


def drop_classifier(
    state_dict: Dict[str, Tensor], dropped: Dict[str, str], head: str = 'head', leaves: Sequence[str] = LEAVES
) -> None:
    """Drops the distillation token's position, and a linear classifier that does not read the class token itself.

    Args:
        state_dict: Weights in our names.
        dropped: Dropped keys with their reasons.
        head: Name of the linear classifier in the file.
        leaves: Endings of its keys in the file.
    """
    if any(key.endswith(('dist_token', 'distillation_token')) for key in dropped):
        _, num_positions, _ = weight_shape(state_dict, 'backbone.pos_embed', 3)
        state_dict['backbone.pos_embed'] = state_dict['backbone.pos_embed'][:, [0, *range(2, num_positions)]]
    if {_CLASSIFIER.reason, POOLING.reason} & set(dropped.values()):
        for leaf, ours in zip(leaves, LEAVES):
            if state_dict.pop(f'head.fc{ours}', None) is not None:
                dropped[head + leaf] = _CLASSIFIER.reason


def drop_cls_position(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Drops the position of a class token that the source keeps without the token."""
    num_patches = weight_shape(state_dict, 'backbone.pos_embed', 3)[1] - 1
    if num_patches and math.isqrt(num_patches) ** 2 == num_patches:
        state_dict['backbone.pos_embed'] = state_dict['backbone.pos_embed'][:, 1:]
        dropped['pos_embed[:, :1]'] = 'position of a class token, which the model does not have'


def flatten_positions(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Makes Segment Anything's positions, (1, H, W, C), a sequence, (1, H * W, C)."""
    if 'backbone.pos_embed' in state_dict and len(weight_shape(state_dict, 'backbone.pos_embed', 3, 4)) == 4:
        state_dict['backbone.pos_embed'] = state_dict['backbone.pos_embed'].flatten(1, 2)


def map_positions(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Makes positions, (1, H * W, C), a map, (1, H, W, C), with the sides of relative positions or equal ones."""
    if 'backbone.pos_embed' not in state_dict:
        raise CheckpointError('plainvit/timm-sam needs positions, which rotary ones are not')
    positions = state_dict['backbone.pos_embed']
    number, tables = positions.shape[1], [key[:-1] for key in state_dict if key.endswith('.rel_pos_h')]
    grids = [tuple((len(state_dict[table + axis]) + 1) // 2 for axis in 'hw') for table in tables]
    grids.append((math.isqrt(number), math.isqrt(number)))
    grid = next((grid for grid in grids if math.prod(grid) == number), None)
    if grid is None:
        raise CheckpointError(
            f'plainvit/timm-sam needs the sides of the map of {number} positions, which nothing tells'
        )
    return {**state_dict, 'backbone.pos_embed': positions.unflatten(1, grid)}


def fold_scale(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Multiplies relative positions by the scale of the queries: their repository applies them to scaled queries."""
    for key in state_dict:
        if key.endswith(('rel_pos_h', 'rel_pos_w')):
            _, head_dim = weight_shape(state_dict, key, 2)
            state_dict[key] = state_dict[key] * head_dim**-0.5


def unfold_scale(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Undoes :func:`fold_scale`."""
    return {
        key: value * value.shape[-1] ** 0.5 if key.endswith(('rel_pos_h', 'rel_pos_w')) else value
        for key, value in state_dict.items()
    }


def refuse_residual(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Refuses to write residual convolutions in timm's layout, which has the other names of this package."""
    residual = [key for key in state_dict if '.residual.' in key]
    if residual:
        raise CheckpointError(f'plainvit/timm has no name for {len(residual)} weights: {", ".join(residual[:5])}')
    return state_dict


def refuse_other_blocks(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Refuses models of timm that have the keys of PlainViT, but rotary positions or norms after the residual sums."""
    other = 'backbone.norm.weight' not in state_dict or POOLING.reason in dropped.values()
    if 'backbone.norm_pre.weight' in state_dict and other:
        raise ValueError('norm_pre without norm, or beside attn_pool, belongs to no CLIP')
    blocks = ('cls_token', 'reg_token', 'blocks.0.ls1.gamma', 'blocks.0.attn.qkv.bias')
    if 'fc_norm.weight' in dropped and not any(f'backbone.{key}' in state_dict for key in blocks):
        raise ValueError("fc_norm without class token, layer scale and qkv.bias belongs to timm's post-norm blocks")


postprocess_timm = steps(refuse_other_blocks, add_patch_bias, add_cls_position, drop_classifier)
preprocess_timm = export_steps(refuse_residual, merge_cls_position, drop_patch_bias)

_layout = partial(Layout, 'plainvit', 'PlainViT')

LAYOUTS = [
    _layout(
        'detectron2',
        ('backbone.net.blocks.0.attn.qkv.weight',),
        {**backbone_under('backbone.net.', DETECTRON2), **_detectron2_pyramid('backbone.'), **heads(norm='ln')},
        drop_cls_position,
    ),
    _layout(
        'detectron2',
        ('net.blocks.0.attn.qkv.weight',),
        {**backbone_under('net.', DETECTRON2), **_detectron2_pyramid('')},
        drop_cls_position,
    ),
    _layout(
        'huggingface',
        ('encoder.layer.0.attention.qkv.weight',),
        backbone_under('', HUGGING_FACE),
        drop_cls_position,
    ),
    *(
        _layout(
            'vitae-repository',
            (prefix + 'blocks.0.attn.rel_pos_h', prefix + 'fpn1.0.weight'),
            vitae_repository(prefix, VITAE_REPOSITORY),
            fold_scale,
            unfold_scale,
        )
        for prefix in ('backbone.', '')
    ),
    *(
        _layout(
            'huggingface',
            (prefix + norm, prefix + query, prefix + 'embeddings.patch_embeddings.projection.weight'),
            {
                **backbone_under(prefix, HUGGING_FACE_VIT),
                'classifier.{leaf}': 'head.fc.{leaf}',
                'cls_classifier.{leaf}': _DISTILLATION,
                'distillation_classifier.{leaf}': _DISTILLATION,
                'decoder.{rest}': DECODER,
            },
            steps(join_qkv, partial(drop_classifier, head='classifier')),
            metadata=dict(norm_eps=1e-12),
            square=True,
        )
        for prefix in ('', 'vit.', 'deit.')
        for norm, query in (
            ('encoder.layer.0.layernorm_before.weight', 'encoder.layer.0.attention.attention.query.weight'),
            ('layers.0.layernorm_before.weight', 'layers.0.attention.q_proj.weight'),
        )
    ),
    _layout(
        'torchvision',
        ('conv_proj.weight', 'encoder.layers.encoder_layer_0.self_attention.in_proj_weight'),
        {
            **backbone_under('', TORCHVISION),
            'heads.head.{leaf}': 'head.fc.{leaf}',
            'heads.pre_logits.{leaf}': _CLASSIFIER,
        },
        partial(drop_classifier, head='heads.head'),
        square=True,
    ),
    _layout(
        'google',
        ('conv_root/kernel', 'embedding/kernel'),
        {'{rest}': Unsupported('belongs to a hybrid with a ResNet before the blocks, which PlainViT is not')},
    ),
    _layout(
        'google',
        ('embedding/kernel', 'Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel'),
        {
            **backbone_under('', GOOGLE),
            'head/kernel': 'head.fc.weight',
            'head/bias': 'head.fc.bias',
            'pre_logits/{leaf}': _CLASSIFIER,
        },
        steps(flatten_linears, join_qkv, partial(drop_classifier, leaves=('/kernel', '/bias'))),
        metadata=lambda state_dict: dict(act='gelu', **heads_of_flax(state_dict)),
        assumed=('act',),
        square=True,
    ),
    _layout(
        'mmpretrain',
        ('backbone.layers.0.attn.qkv.weight', 'backbone.layers.0.ln1.weight'),
        {
            **backbone_under('backbone.', MMPRETRAIN),
            'head.layers.head.{leaf}': 'head.fc.{leaf}',
            'head.layers.pre_logits.{leaf}': _CLASSIFIER,
        },
        steps(rename_gated, add_cls_position, partial(drop_classifier, head='head.layers.head')),
        restore_gated,
    ),
    _layout(
        'mmpretrain',
        ('layers.0.attn.qkv.weight', 'layers.0.ln1.weight'),
        backbone_under('', MMPRETRAIN),
        steps(rename_gated, add_cls_position),
        restore_gated,
    ),
    # The backbone alone comes first: MMSegmentation's init_cfg loads this form, and so export writes it.
    _layout('mmseg', ('layers.0.attn.attn.in_proj_weight',), backbone_under('', MMSEG), add_patch_bias),
    _layout(
        'mmseg',
        ('backbone.layers.0.attn.attn.in_proj_weight',),
        {
            **backbone_under('backbone.', MMSEG),
            **unchanged('neck.{rest}', 'decode_head.{rest}', 'auxiliary_head.{rest}'),
        },
        add_patch_bias,
    ),
    # Segment Anything: the whole model, its encoder alone, and its encoder in timm.
    *(
        _layout(
            'sam',
            (prefix + 'blocks.0.attn.rel_pos_h', prefix + 'blocks.0.mlp.lin1.weight'),
            part_under(
                prefix,
                {
                    **_EMBEDDING,
                    **{key.replace('mlp.fc', 'mlp.lin'): ours for key, ours in _BLOCKS.items()},
                    **_REL_POS,
                    'neck.{i}.{leaf}': _SAM_NECK,
                },
                'PlainViT',
                Dropped("belongs to Segment Anything's prompt encoder or mask decoder"),
            ),
            flatten_positions,
            map_positions,
        )
        for prefix in ('image_encoder.', '')
    ),
    # Without its neck, the encoder in timm has the names of this package.
    _layout(
        'timm-sam',
        ('patch_embed.proj.weight', 'blocks.0.attn.rel_pos_h', 'neck.0.weight'),
        {
            **backbone_under('', {**_EMBEDDING, **_BLOCKS, **_REL_POS}),
            'neck.{i}.{leaf}': _SAM_NECK,
            'head.{rest}': _SAM_NECK,
        },
        flatten_positions,
        map_positions,
    ),
    # This package's: of a whole model, of a backbone alone with relative positions, and without them.
    _layout(
        'mmvitzoo',
        ('backbone.patch_embed.proj.weight', 'backbone.blocks.0.attn.qkv.weight'),
        {
            **backbone_under('backbone.', OURS),
            'backbone.{rest}': Unsupported("is no weight of this package's PlainViT"),
            **unchanged('{rest}'),
        },
    ),
    _layout(
        'mmvitzoo',
        ('patch_embed.proj.weight', 'blocks.0.attn.rel_pos_h'),
        backbone_under('', OURS),
        flatten_positions,
    ),
    # DeiT's and MAE's checkpoints have timm's names.
    _layout(
        'timm',
        ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'),
        {**backbone_under('', {**TIMM_OPTIONS, **_OUR_RESIDUAL}), **TIMM_HEADS},
        postprocess_timm,
        preprocess_timm,
        metadata_of_timm,
        assumed=('act',),
    ),
]
