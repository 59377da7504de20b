"""What several families share."""

from .depthwise import DepthwiseConv
from .init import init_transformer_weights

__all__ = ['DepthwiseConv', 'init_transformer_weights']
