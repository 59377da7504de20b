"""Patch embeddings and absolute positions."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
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
        patch_size: Side of a patch in pixels.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_dim, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H', W', C), H' and W' are H and W divided by the patch size, rounded up."""
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


def resize_pos_embed(pos_embed: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """(1, rows * columns of ``grid``, C) -> (1, H, W, C) for ``size`` (H, W) by bicubic interpolation.

    timm's ``resample_abs_pos_embed`` compares sizes, which adds guards to a compiled graph.
    """
    x = pos_embed.unflatten(1, tuple(grid))
    if statically_true(grid[0] == size[0]) and statically_true(grid[1] == size[1]):
        return x
    x = F.interpolate(at_least_float32(x.permute(0, 3, 1, 2)), size=tuple(size), mode='bicubic', align_corners=False)
    return x.permute(0, 2, 3, 1).to(pos_embed.dtype)
