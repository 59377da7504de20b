"""Layouts of plain ViT and ViTDet checkpoints. This package has timm's names."""

import math
from functools import partial
from typing import Dict

from torch import Tensor

from ...models.backbones.base import weight_shape
from ..reading import CheckpointError
from .detectron2 import heads
from .layout import Dropped, Layout, Unsupported, backbone_under, unchanged

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
    **unchanged('fc_norm.{leaf}', 'norm_pre.{leaf}', 'reg_token', 'rope.periods', 'blocks.{b}.ls{i}.gamma'),
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

_DISTILLATION = Dropped('PlainViT has no distillation token; its position and its head are dropped as well')
_CLASSIFIER = Dropped('belongs to a kind of classifier head that is not converted')
_DECODER = Dropped('belongs to the decoder of masked autoencoding')


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


def drop_classifier(state_dict: Dict[str, Tensor], dropped: Dict[str, str], head: str = 'head') -> None:
    """Drops the distillation token's position, and a linear classifier that does not read the class token itself.

    Args:
        state_dict: Weights in our names.
        dropped: Dropped keys with their reasons.
        head: Name of the linear classifier in the file.
    """
    if 'dist_token' in dropped:
        _, num_positions, _ = weight_shape(state_dict, 'backbone.pos_embed', 3)
        state_dict['backbone.pos_embed'] = state_dict['backbone.pos_embed'][:, [0, *range(2, num_positions)]]
    if _CLASSIFIER.reason in dropped.values():
        for leaf in ('weight', 'bias'):
            if state_dict.pop(f'head.fc.{leaf}', None) is not None:
                dropped[f'{head}.{leaf}'] = _CLASSIFIER.reason


def drop_cls_position(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Drops the position of a class token that the source keeps without the token."""
    num_patches = weight_shape(state_dict, 'backbone.pos_embed', 3)[1] - 1
    if num_patches and math.isqrt(num_patches) ** 2 == num_patches:
        state_dict['backbone.pos_embed'] = state_dict['backbone.pos_embed'][:, 1:]
        dropped['pos_embed[:, :1]'] = 'position of a class token, which the model does not have'


def flatten_positions(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Makes Segment Anything's positions, (1, H, W, C), a sequence, (1, H * W, C)."""
    if len(weight_shape(state_dict, 'backbone.pos_embed', 3, 4)) == 4:
        state_dict['backbone.pos_embed'] = state_dict['backbone.pos_embed'].flatten(1, 2)


def map_positions(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Makes positions, (1, H * W, C), a map, (1, H, W, C), with the sides of relative positions or equal ones."""
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


def add_patch_bias(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Adds the bias that MMSegmentation 1.2's patch embedding lacks by default."""
    dim = weight_shape(state_dict, 'backbone.patch_embed.proj.weight', 4)[0]
    bias = state_dict['backbone.patch_embed.proj.weight'].new_zeros(dim)
    state_dict.setdefault('backbone.patch_embed.proj.bias', bias)


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
    _layout(
        'mmpretrain',
        ('backbone.layers.0.attn.qkv.weight', 'backbone.layers.0.ln1.weight'),
        {
            **backbone_under('backbone.', MMPRETRAIN),
            'head.layers.head.{leaf}': 'head.fc.{leaf}',
            'head.layers.pre_logits.{leaf}': _CLASSIFIER,
        },
        partial(drop_classifier, head='head.layers.head'),
    ),
    _layout('mmpretrain', ('layers.0.attn.qkv.weight', 'layers.0.ln1.weight'), backbone_under('', MMPRETRAIN)),
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
    # Without its neck, Segment Anything's encoder in timm has the names of this package.
    _layout(
        'timm-sam',
        ('patch_embed.proj.weight', 'blocks.0.attn.rel_pos_h', 'neck.0.weight'),
        {
            **backbone_under('', {**_EMBEDDING, **_BLOCKS, **_REL_POS}),
            'neck.{i}.{leaf}': Dropped("Segment Anything's own neck"),
            'head.{rest}': Dropped("Segment Anything's own neck"),
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
        {
            **backbone_under('', {**TIMM, **_OUR_RESIDUAL}),
            'head.{leaf}': 'head.fc.{leaf}',
            'dist_token': _DISTILLATION,
            'head_dist.{leaf}': _DISTILLATION,
            'pre_logits.{rest}': _CLASSIFIER,
            'fc_norm.{leaf}': _CLASSIFIER,
            'mask_token': _DECODER,
            'decoder_{rest}': _DECODER,
        },
        drop_classifier,
        refuse_residual,
    ),
]
