"""Layouts of DINOv2, DINOv3, DeiT III, and of the trainings DINO, iBOT and MoCo v3; all of them are PlainViT."""

from functools import partial
from typing import Any, Dict

from torch import Tensor

from ...models.backbones.base import weight_shape
from .layout import Dropped, Layout, Unsupported, backbone_under, part_under, unchanged
from .vit import DECODER, TIMM, drop_classifier
from .vit_steps import (
    add_cls_position,
    drop_rotary_buffers,
    export_steps,
    join_biases,
    join_gate,
    join_qkv,
    rename_gated,
    restore_gated,
    split_biases,
    split_gate,
    steps,
    zero_key_bias,
)

_MASK = Dropped('stands for masked patches in pretraining')
_PRETRAINING = Dropped('belongs to heads, losses or another network of the pretraining')
_CLASSIFIER = Dropped('reads more than the class token')

DINOV2 = {
    **TIMM,
    **unchanged('blocks.{b}.ls{i}.gamma', 'blocks.{b}.mlp.w12.{leaf}', 'blocks.{b}.mlp.w3.{leaf}'),
    'register_tokens': 'reg_token',
    'mask_token': _MASK,
}
# Trainings of large models have the blocks in chunks. Their numbers count over all chunks.
DINOV2_IN_CHUNKS = {key.replace('blocks.', 'blocks.{chunk}.'): ours for key, ours in DINOV2.items()}
DINOV2_HUGGING_FACE = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.register_tokens': 'reg_token',
    'embeddings.mask_token': _MASK,
    'embeddings.patch_embeddings.projection.{leaf}': 'patch_embed.proj.{leaf}',
    'encoder.layer.{b}.norm{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    'encoder.layer.{b}.attention.attention.query.{leaf}': 'blocks.{b}.attn.q.{leaf}',
    'encoder.layer.{b}.attention.attention.key.{leaf}': 'blocks.{b}.attn.k.{leaf}',
    'encoder.layer.{b}.attention.attention.value.{leaf}': 'blocks.{b}.attn.v.{leaf}',
    'encoder.layer.{b}.attention.output.dense.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'encoder.layer.{b}.layer_scale{i}.lambda1': 'blocks.{b}.ls{i}.gamma',
    'encoder.layer.{b}.mlp.fc{i}.{leaf}': 'blocks.{b}.mlp.fc{i}.{leaf}',
    'encoder.layer.{b}.mlp.weights_in.{leaf}': 'blocks.{b}.mlp.fc1.{leaf}',
    'encoder.layer.{b}.mlp.weights_out.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
    'layernorm.{leaf}': 'norm.{leaf}',
    # transformers 5 in memory
    'encoder.layer.{b}.attention.q_proj.{leaf}': 'blocks.{b}.attn.q.{leaf}',
    'encoder.layer.{b}.attention.k_proj.{leaf}': 'blocks.{b}.attn.k.{leaf}',
    'encoder.layer.{b}.attention.v_proj.{leaf}': 'blocks.{b}.attn.v.{leaf}',
    'encoder.layer.{b}.attention.o_proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'encoder.layer.{b}.mlp.gate_proj.{leaf}': 'blocks.{b}.mlp.gate.{leaf}',
    'encoder.layer.{b}.mlp.up_proj.{leaf}': 'blocks.{b}.mlp.value.{leaf}',
    'encoder.layer.{b}.mlp.down_proj.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
}
_DINOV3_COMMON = {key: ours for key, ours in TIMM.items() if key not in ('pos_embed', 'blocks.{b}.attn.qkv.{leaf}')}
DINOV3 = {
    **_DINOV3_COMMON,
    **unchanged(
        'blocks.{b}.attn.qkv.weight',
        'blocks.{b}.attn.qkv.bias',
        'blocks.{b}.attn.qkv.bias_mask',
        'blocks.{b}.ls{i}.gamma',
    ),
    'storage_tokens': 'reg_token',
    'rope_embed.periods': 'rope.periods',
    'blocks.{b}.mlp.w1.{leaf}': 'blocks.{b}.mlp.gate.{leaf}',
    'blocks.{b}.mlp.w2.{leaf}': 'blocks.{b}.mlp.value.{leaf}',
    'blocks.{b}.mlp.w3.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
    'mask_token': _MASK,
    'local_cls_norm.{leaf}': _PRETRAINING,
    'projectors.{rest}': _PRETRAINING,
}
DINOV3_TIMM = {
    **_DINOV3_COMMON,
    **unchanged('reg_token', 'blocks.{b}.attn.qkv.{leaf}', 'blocks.{b}.attn.q_bias', 'blocks.{b}.attn.v_bias'),
    'blocks.{b}.gamma_{i}': 'blocks.{b}.ls{i}.gamma',
    'blocks.{b}.mlp.fc1_g.{leaf}': 'blocks.{b}.mlp.gate.{leaf}',
    'blocks.{b}.mlp.fc1_x.{leaf}': 'blocks.{b}.mlp.value.{leaf}',
}
# `layer` in files, `model.layer` in the memory of transformers 5
DINOV3_HUGGING_FACE = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.register_tokens': 'reg_token',
    'embeddings.mask_token': _MASK,
    'embeddings.patch_embeddings.{leaf}': 'patch_embed.proj.{leaf}',
    **{
        f'{layer}.{{b}}.{theirs}': f'blocks.{{b}}.{ours}'
        for layer in ('layer', 'model.layer')
        for theirs, ours in {
            'norm{i}.{leaf}': 'norm{i}.{leaf}',
            'attention.q_proj.{leaf}': 'attn.q.{leaf}',
            'attention.k_proj.{leaf}': 'attn.k.{leaf}',
            'attention.v_proj.{leaf}': 'attn.v.{leaf}',
            'attention.o_proj.{leaf}': 'attn.proj.{leaf}',
            'layer_scale{i}.lambda1': 'ls{i}.gamma',
            'mlp.gate_proj.{leaf}': 'mlp.gate.{leaf}',
            'mlp.up_proj.{leaf}': 'mlp.up.{leaf}',
            'mlp.down_proj.{leaf}': 'mlp.fc2.{leaf}',
        }.items()
    },
    'norm.{leaf}': 'norm.{leaf}',
}
DEIT3 = {**TIMM, 'blocks.{b}.gamma_{i}': 'blocks.{b}.ls{i}.gamma'}


def metadata_of_dinov2(state_dict: Dict[str, Tensor], offset: float = 0.1) -> Dict[str, Any]:
    """Returns the rule of resized positions, which differs with registers, and the norm of all outputs.

    Args:
        state_dict: Renamed weights.
        offset: Offset without registers: 0.1 in the authors' code, 0 in Hugging Face's.
    """
    if 'backbone.reg_token' in state_dict:
        return dict(norm_outputs=True, interpolate_antialias=True)
    return dict(norm_outputs=True, interpolate_offset=offset)


def metadata_of_mocov3(state_dict: Dict[str, Tensor]) -> Dict[str, Any]:
    """Returns the number of heads: 12 in both published models, ViT-S and ViT-B."""
    dim = weight_shape(state_dict, 'backbone.blocks.0.attn.proj.weight', 2)[0]
    return dict(num_heads=12) if dim in (384, 768) else {}


def name_up(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Renames ``mlp.up``: the value of a gated MLP beside ``mlp.gate``, the first layer of a plain one."""
    for key in list(state_dict):
        if '.mlp.up.' in key:
            is_gated = key.replace('.up.', '.gate.') in state_dict
            state_dict[key.replace('.up.', '.value.' if is_gated else '.fc1.')] = state_dict.pop(key)


_layout = partial(Layout, 'plainvit', 'PlainViT')
_dinov3 = partial(
    _layout,
    metadata=dict(norm_eps=1e-5, norm_outputs=True, rope_type='dinov3'),
    note=(
        "Meta's DINOv3 weights are under the DINOv3 License, its EUPE weights under the FAIR Noncommercial Research "
        'License; a converted file keeps the license of its source'
    ),
)
_SAPIENS = {'{rest}': Unsupported('belongs to Sapiens2: grouped queries, query-key norm and RMSNorm are not supported')}

LAYOUTS = [
    # The teacher of a training comes first. DINOv3's authors have all keys of DINOv2's, and more.
    _layout('sapiens2', ('storage_tokens', 'blocks.0.attn.wq.weight'), _SAPIENS),
    _layout('sapiens2', ('reg_token', 'blocks.0.attn.q_norm.weight', 'blocks.0.attn.q_proj.weight'), _SAPIENS),
    *(
        _dinov3(
            'dinov3',
            (prefix + 'storage_tokens', prefix + 'blocks.0.attn.qkv.weight'),
            part_under(prefix, DINOV3, 'PlainViT', _PRETRAINING),
            steps(zero_key_bias, join_gate),
        )
        for prefix in ('', 'teacher.backbone.', 'backbone.')
    ),
    # `vision_encoder.` is TIPSv2's.
    *(
        _layout(
            'dinov2',
            (prefix + 'mask_token', prefix + 'patch_embed.proj.weight', prefix + first),
            part_under(prefix, table, 'PlainViT', _PRETRAINING),
            rename_gated,
            restore_gated,
            metadata_of_dinov2,
            square=True,
        )
        for prefix in ('', 'teacher.backbone.', 'backbone.', 'vision_encoder.')
        for first, table in (('blocks.0.ls1.gamma', DINOV2), ('blocks.0.0.ls1.gamma', DINOV2_IN_CHUNKS))
    ),
    *(
        _layout(
            'dinov2-huggingface',
            (prefix + 'encoder.layer.0.layer_scale1.lambda1', prefix + 'encoder.layer.0.norm1.weight'),
            {**backbone_under(prefix, DINOV2_HUGGING_FACE), 'classifier.{leaf}': _CLASSIFIER},
            steps(join_qkv, join_gate),
            metadata=partial(metadata_of_dinov2, offset=0.0),
            square=True,
        )
        for prefix in ('', 'dinov2.', 'dinov2_with_registers.')
    ),
    _dinov3(
        'timm-dinov3',
        ('cls_token', 'reg_token', 'blocks.0.gamma_1', 'blocks.0.attn.qkv.weight'),
        {
            **backbone_under('', DINOV3_TIMM),
            'pos_embed': Unsupported('has no place beside rotary positions'),
            'head.{leaf}': 'head.fc.{leaf}',
            'fc_norm.{leaf}': Dropped('belongs to a kind of classifier head that is not converted'),
        },
        steps(join_biases, zero_key_bias, join_gate, drop_classifier),
        export_steps(drop_rotary_buffers, split_biases, split_gate),
    ),
    *(
        _dinov3(
            'dinov3-huggingface',
            (prefix + layer + '.0.attention.q_proj.weight', prefix + 'embeddings.register_tokens'),
            {**backbone_under(prefix, DINOV3_HUGGING_FACE), 'classifier.{leaf}': _CLASSIFIER},
            steps(name_up, join_qkv, zero_key_bias, join_gate),
        )
        for prefix in ('', 'dinov3_vit.')
        for layer in ('layer', 'model.layer')
    ),
    _layout(
        'deit3',
        ('pos_embed', 'cls_token', 'blocks.0.gamma_1', 'blocks.0.attn.qkv.bias'),
        {**backbone_under('', DEIT3), 'head.{leaf}': 'head.fc.{leaf}'},
        add_cls_position,
        metadata=dict(interpolate_antialias=True),
        square=True,
        note='RoPE-ViT with axial and learned positions has the same names in timm, and is no DeiT III',
    ),
    # DINO's and iBOT's student or teacher with its head
    _layout(
        'dino',
        ('backbone.patch_embed.proj.weight', 'backbone.blocks.0.attn.qkv.weight', 'head.last_layer.weight_v'),
        part_under('backbone.', {**TIMM, 'masked_embed': DECODER}, 'PlainViT', _PRETRAINING),
        metadata=dict(interpolate_offset=0.1),
        square=True,
    ),
    # The authors evaluate the base encoder, not the momentum encoder.
    *(
        _layout(
            'mocov3',
            (prefix + 'patch_embed.proj.weight', prefix + 'blocks.0.attn.qkv.weight', prefix + 'head.0.weight'),
            {**backbone_under(prefix, TIMM), '{rest}': _PRETRAINING},
            metadata=metadata_of_mocov3,
            square=True,
        )
        for prefix in ('base_encoder.', 'momentum_encoder.', '')
    ),
]
