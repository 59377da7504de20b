"""Patch embeddings and absolute positions."""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .compiling import statically_true
from .dtypes import at_least_float32
from .padding import pad_to_multiple

# torch.fx records a call of a wrapped function instead of tracing its branches on sizes.
torch.fx.wrap('pad_to_multiple')


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens (https://arxiv.org/abs/2010.11929).

    Images that the patch size does not divide are padded with zeros at the bottom and on the right.

    Args:
        in_dim: Channels of the image.
        dim: Channels of the tokens.
        patch_size: (H, W) of a patch in pixels.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: Tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_dim, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H', W', C'), H' and W' are H and W divided by the patch size, rounded up."""
        x = self.proj(pad_to_multiple(x, self.patch_size, channels_first=True))
        # Contiguous once: residual sums inherit the memory format of their first operand.
        return x.permute(0, 2, 3, 1).contiguous()


class OverlapPatchEmbed(nn.Module):
    """Overlapping patches to tokens.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Side of a patch in pixels of the input, an odd number.
        stride: Distance between patches in pixels of the input.
        norm: Norm over the channels, None for no norm.
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, norm: Optional[nn.Module] = None):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H', W', C'), H' and W' are H and W divided by the stride, rounded up."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1).contiguous())


def resize_pos_embed(
    pos_embed: Tensor, grid: Sequence[int], size: Sequence[int], offset: float = 0.0, antialias: bool = False
) -> Tensor:
    """(1, rows * columns of ``grid``, C) -> (1, H, W, C) for ``size`` (H, W) by bicubic interpolation.

    Each axis is one product with a matrix of weights, see :func:`bicubic_weights`. This equals ``F.interpolate``, adds
    no guards on sizes to a compiled graph, and serves all sizes in an exported one.

    Args:
        pos_embed: Table in row-major order.
        grid: (H, W) of the table.
        size: (H, W) of the result.
        offset: Number that is added to the new sizes to compute the scale factors, but not if the grid stays the same.
            The authors of DINOv2 use 0.1.
        antialias: Use wider kernels for smaller sizes, as ``F.interpolate(..., antialias=True)`` does.
    """
    x = pos_embed.unflatten(1, tuple(grid))
    if statically_true(grid[0] == size[0]) and statically_true(grid[1] == size[1]):
        return x
    # Sizes as tensors: a graph for all sizes leaves the table as it is for the grid that it was learned for.
    sides = [torch.ones(side, device=pos_embed.device).sum() for side in size]
    is_learned = (sides[0] == grid[0]) & (sides[1] == grid[1])
    rows, cols = (
        bicubic_weights(length, side, length / (count + offset * ~is_learned), antialias)
        for length, side, count in zip(grid, size, sides)
    )
    x = at_least_float32(x)
    x = torch.einsum('hr,brcd->bhcd', rows.to(x.dtype), x)
    return torch.einsum('wc,bhcd->bhwd', cols.to(x.dtype), x).to(pos_embed.dtype)


def bicubic_weights(length: int, size: int, scale: Tensor, antialias: bool) -> Tensor:
    """Returns the matrix of bicubic interpolation along one axis, as PyTorch's ``F.interpolate`` defines it.

    Without antialiasing each output reads the four nearest inputs with Keys' kernel of a = -0.75, clamped at the
    borders. With it, a = -0.5, the kernel is as wide as the scale factor, and it is cut at the borders and normalized.

    Args:
        length: Number of inputs.
        size: Number of outputs.
        scale: Distance of the outputs in inputs, a scalar.
        antialias: Use the second form.

    Returns:
        (size, length), float32.
    """
    centers = (torch.arange(size, device=scale.device) + 0.5)[:, None] * scale
    inputs = torch.arange(length, device=scale.device)
    if antialias:
        width = scale.clamp(min=1)
        inside = (inputs >= (centers - 2 * width + 0.5).floor()) & (inputs < (centers + 2 * width + 0.5).floor())
        weights = _keys_kernel((inputs + 0.5 - centers) / width, -0.5) * inside
        return weights / weights.sum(1, keepdim=True)
    first = (centers - 0.5).floor() - 1
    weights = torch.zeros_like(centers) * inputs  # (size, length)
    for index in (first, first + 1, first + 2, first + 3):
        weights = weights + _keys_kernel(centers - 0.5 - index, -0.75) * (index.clamp(0, length - 1) == inputs)
    return weights


def _keys_kernel(t: Tensor, a: float) -> Tensor:
    """Evaluates the cubic convolution kernel of Keys (1981) with parameter ``a``."""
    t = t.abs()
    inner = ((a + 2) * t - (a + 3)) * t * t + 1
    outer = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return torch.where(t <= 1, inner, torch.where(t < 2, outer, torch.zeros_like(t)))
