"""Layers shared by several backbones."""

from .attention import Attention, RelPosAttention, rel_pos_attention_flash, sdpa, split_heads
from .conv import ConvRelativePosition, DepthwiseConv
from .cpu import optimize_for_inference
from .dtypes import at_least_float32
from .init import init_linear_weights, init_transformer_weights
from .layer_scale import LayerScale
from .norm import LayerNorm2d
from .padding import pad_to_multiple
from .patch_embed import OverlapPatchEmbed, PatchEmbed, resize_pos_embed
from .rope import RotaryPositions, apply_rotary
from .windows import window_mask, window_partition, window_unpartition

__all__ = [
    'Attention',
    'ConvRelativePosition',
    'DepthwiseConv',
    'LayerNorm2d',
    'LayerScale',
    'OverlapPatchEmbed',
    'PatchEmbed',
    'RelPosAttention',
    'RotaryPositions',
    'apply_rotary',
    'at_least_float32',
    'init_linear_weights',
    'init_transformer_weights',
    'optimize_for_inference',
    'pad_to_multiple',
    'rel_pos_attention_flash',
    'resize_pos_embed',
    'sdpa',
    'split_heads',
    'window_mask',
    'window_partition',
    'window_unpartition',
]
