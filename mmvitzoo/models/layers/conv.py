"""Depthwise convolutions on channels-last maps."""

from typing import Dict

import torch
from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a (B, H, W, C) map.

    Args:
        dim: Channels.
        kernel_size: Side of the kernel, an odd number.
        stride: Stride.
        bias: Add a learned bias.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True):
        super().__init__(dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C), H' and W' are H and W divided by the stride, rounded up."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvRelativePosition(nn.Module):
    """Convolutional relative position encoding (CRPE) of CoaT (https://arxiv.org/abs/2104.06399).

    Groups of heads see the values through depthwise convolutions of different kernel sizes.

    Args:
        dim: Channels of the values, a multiple of the number of heads.
        kernel_heads: Number of heads by kernel size.
    """

    def __init__(self, dim: int, kernel_heads: Dict[int, int]):
        super().__init__()
        head_dim = dim // sum(kernel_heads.values())
        self.widths = [head_dim * heads for heads in kernel_heads.values()]
        self.convs = nn.ModuleList(DepthwiseConv(width, kernel) for width, kernel in zip(self.widths, kernel_heads))

    def forward(self, v: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        chunks = v.split(self.widths, -1)
        return torch.cat([conv(chunks[i]) for i, conv in enumerate(self.convs)], -1)
