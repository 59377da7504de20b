"""Depthwise convolution on the maps that live between transformer blocks."""

from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of stride 1 that keeps the size of a channels-last map.

    Args:
        dim: Channels.
        kernel_size: An odd number.
    """

    def __init__(self, dim: int, kernel_size: int):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
