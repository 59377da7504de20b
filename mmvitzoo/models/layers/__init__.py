"""What several families share."""

from .attention import Attention, attend
from .depthwise import DepthwiseConv
from .init import init_linear_weights, init_transformer_weights
from .linear import Linear, Mlp
from .norm import LayerNorm2d
from .patch_embedding import PatchEmbedding
from .windows import merge_windows, partition_windows

__all__ = [
    'Attention',
    'DepthwiseConv',
    'LayerNorm2d',
    'Linear',
    'Mlp',
    'PatchEmbedding',
    'attend',
    'init_linear_weights',
    'init_transformer_weights',
    'merge_windows',
    'partition_windows',
]
