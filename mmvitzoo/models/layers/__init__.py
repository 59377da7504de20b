"""What several families share."""

from .attention import Attention, RelativeAttention, attend, attend_plain
from .block import Block, Recomputed
from .compiling import is_compiling, known
from .depthwise import DepthwiseConv
from .init import init_linear_weights, init_transformer_weights
from .linear import Linear, Mlp, split_linear
from .norm import LayerNorm2d
from .patch_embedding import PatchEmbedding
from .precision import without_autocast
from .windows import merge_windows, partition_windows, window_mask

__all__ = [
    'Attention',
    'Block',
    'DepthwiseConv',
    'LayerNorm2d',
    'Linear',
    'Mlp',
    'PatchEmbedding',
    'Recomputed',
    'RelativeAttention',
    'attend',
    'attend_plain',
    'init_linear_weights',
    'init_transformer_weights',
    'is_compiling',
    'known',
    'merge_windows',
    'partition_windows',
    'split_linear',
    'window_mask',
    'without_autocast',
]
