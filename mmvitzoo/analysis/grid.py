"""Where the tokens of a backbone's maps lie on the image."""

import copy
from typing import List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..models.backbones import PlainViT
from ..models.backbones.base import Backbone


class Grid(NamedTuple):
    """The tokens of a map, on the image.

    Attributes:
        stride: Pixels between the centres of neighbouring tokens.
        origin: Pixels from the left border of the image to where the first token's cell begins, the square
            of ``stride`` pixels around its centre; from the upper border as many.
    """

    stride: int
    origin: float

    def size(self, image_size: Sequence[int]) -> Tuple[int, int]:
        """Rows and columns of tokens for an image of (H, W) pixels."""
        return -(-image_size[0] // self.stride), -(-image_size[1] // self.stride)

    def center(self, token: int) -> float:
        """Pixels from the border of the image to the centre of a row, or column, of tokens."""
        return self.origin + (token + 0.5) * self.stride

    def nearest(self, side: int) -> Tensor:
        """(side,), the row, or column, of tokens that is nearest to each row, or column, of an image's pixels."""
        tokens = (torch.arange(side) + 0.5 - self.origin).div(self.stride, rounding_mode='floor').long()
        return tokens.clamp(0, -(-side // self.stride) - 1)

    def extent(self, first: int, count: int, side: int) -> Tuple[int, int]:
        """The first and the last pixel, plus 1, that are nearest to ``count`` rows, or columns, of tokens."""
        tokens = self.nearest(side)
        pixels = ((tokens >= first) & (tokens < first + count)).nonzero()
        return pixels[0].item(), pixels[-1].item() + 1


def output_grids(backbone: Backbone) -> List[Grid]:
    """The grid of each map that a backbone returns: a plain one, or a pyramid of strides 4, 8, 16 and 32."""
    if isinstance(backbone, PlainViT):
        return [plain_grid(backbone)] * len(backbone.out_indices)
    return [pyramid_grid(4 * 2**stage) for stage in backbone.out_indices]


def output_names(backbone: Backbone) -> List[str]:
    """What each map that a backbone returns is of, numbered as in ``out_indices``."""
    part = 'block' if isinstance(backbone, PlainViT) else 'stage'
    return [f'{part} {index}' for index in backbone.out_indices]


def plain_grid(backbone: PlainViT) -> Grid:
    """The grid of every map of a plain backbone: patches lie side by side."""
    if hasattr(backbone.stem, 'projection'):
        return Grid(backbone.stem.projection.stride[0], 0)
    return pyramid_grid(16)  # of ViTAE-S's reduction cells, whose dilated convolutions add a pixel to the centres


def pyramid_grid(stride: int) -> Grid:
    """The grid of patches that overlap, where convolutions centre token i on pixel ``i * stride``."""
    return Grid(stride, 0.5 - stride / 2)


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a model, which returns maps also where the model has it return class tokens.

    Args:
        model: A backbone of this package, or a model that has one as ``backbone``.

    Returns:
        A backbone that shares its modules with the model's.

    Raises:
        ValueError: The backbone is of another package.
    """
    backbone = getattr(model, 'backbone', model)
    if not isinstance(backbone, Backbone):
        raise ValueError(f'only backbones of mmvitzoo can be seen into, got {type(backbone).__name__}')
    backbone = copy.copy(backbone)
    if isinstance(backbone, PlainViT):
        backbone.out_type = 'featmap'
    return backbone
