"""Positions of a backbone's tokens on the image."""

import copy
from typing import List, NamedTuple, Sequence, Tuple, Union

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..models.backbones.base import Backbone
from ..models.layers.padding import ceil_div


class Grid(NamedTuple):
    """Tokens of a map as cells on the image.

    An axis is 0 for rows and 1 for columns of tokens.

    Attributes:
        stride: Side of a square cell in pixels, or its (H, W); also the distance between neighboring tokens.
        origin: Distance in pixels from the left border of the image to the first cell, and from the top border.
    """

    stride: Union[int, Tuple[int, int]]
    origin: float

    @property
    def sides(self) -> Tuple[int, int]:
        """Height and width of a cell in pixels."""
        return to_2tuple(self.stride)

    def size(self, image_size: Sequence[int]) -> Tuple[int, int]:
        """Returns the rows and columns of tokens for an image of (H, W) pixels."""
        return tuple(ceil_div(*sides) for sides in zip(image_size, self.sides))

    def center(self, index: int, axis: int) -> float:
        """Returns the distance in pixels from the border of the image to the center of a row or column of tokens."""
        return self.origin + (index + 0.5) * self.sides[axis]

    def nearest(self, side: int, axis: int) -> Tensor:
        """Returns the index of the nearest row or column of tokens for each pixel of a side, (side,)."""
        stride = self.sides[axis]
        indices = (torch.arange(side) + 0.5 - self.origin).div(stride, rounding_mode='floor').long()
        return indices.clamp(0, ceil_div(side, stride) - 1)

    def pixels(self, first: int, count: int, side: int, axis: int) -> Tuple[int, int]:
        """Returns the range of pixels, the end excluded, that are nearest to ``count`` rows or columns of tokens."""
        indices = self.nearest(side, axis)
        pixels = ((indices >= first) & (indices < first + count)).nonzero()
        return pixels[0].item(), pixels[-1].item() + 1

    def __str__(self) -> str:
        return str(self.stride) if isinstance(self.stride, int) else '{} x {}'.format(*self.stride)


def token_grid(backbone: Backbone, stride: Union[int, Tuple[int, int]]) -> Grid:
    """Returns the grid of a backbone's tokens at a stride.

    Convolutions with overlapping patches center token i on pixel ``i * stride``; other patches lie side by side.
    """
    return Grid(stride, 0.5 - stride / 2 if backbone.overlapping_patches else 0)


def output_grids(backbone: Backbone) -> List[Grid]:
    """Returns the grid of each map that a backbone returns."""
    return [token_grid(backbone, backbone.strides[index]) for index in backbone.out_indices]


def output_names(backbone: Backbone) -> List[str]:
    """Returns the name of each map that a backbone returns, such as ``'stage 0'``."""
    # The maps of plain backbones, which come from blocks, have one stride.
    unit = 'block' if len(set(backbone.strides)) == 1 else 'stage'
    return [f'{unit} {index}' for index in backbone.out_indices]


def get_backbone(model: nn.Module) -> Backbone:
    """Returns the backbone of a model in a form that returns maps, even if the model uses class tokens.

    Args:
        model: Backbone of this package, or a model with one as ``backbone``.

    Returns:
        A shallow copy of the backbone, which shares its modules.

    Raises:
        ValueError: The backbone is not from this package.
    """
    backbone = getattr(model, 'backbone', model)
    if not isinstance(backbone, Backbone):
        raise ValueError(f'only backbones of mmvitzoo are supported, got {type(backbone).__name__}')
    backbone = copy.copy(backbone)
    if hasattr(backbone, 'out_type'):
        backbone.out_type, backbone.output_cls_token = 'featmap', False
    return backbone
