"""Rotary position embedding of DINOv3, axial and in normalized coordinates.

RoFormer: Su et al., https://arxiv.org/abs/2104.09864
DINOv3: Siméoni et al., https://arxiv.org/abs/2508.10104

A token in row i and column j of a map of H x W tokens has the coordinates y = 2 (i + 0.5) / H - 1 and
x = 2 (j + 0.5) / W - 1. With D channels of a head and the periods p_k = base^(2k / (D / 2)), k = 0 .. D / 4 - 1, its
angles are 2 pi (y / p_0, y / p_1, ..., x / p_0, x / p_1, ...), D / 2 numbers. Channels c and c + D / 2 of queries and
keys are rotated by angle c. Every grid has the same range of coordinates, so nothing is resized.
"""

import math
from typing import Any, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import at_least_float32

# torch.fx records a call of a wrapped function instead of tracing its branches on sizes.
torch.fx.wrap('rotary_angles')


class RotaryPositions(nn.Module):
    """Cosines and sines of the angles of all tokens.

    Args:
        head_dim: Channels of a head, a multiple of 4.
        num_prefix_tokens: Number of tokens before those of the map, which are not rotated.
        base: Ratio of the periods.

    Attributes:
        periods: Buffer of (head_dim / 4,), at least float32. Checkpoints of the DINOv3 authors hold periods that were
            rounded to bfloat16, and these are used as they are.
    """

    def __init__(self, head_dim: int, num_prefix_tokens: int = 0, base: float = 100.0):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        exponents = torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4)
        self.register_buffer('periods', base**exponents)

    def _apply(self, fn: Any, *args: Any) -> 'RotaryPositions':
        periods = self.periods
        super()._apply(fn, *args)
        if self.periods.dtype in (torch.float16, torch.bfloat16):  # model.half() would round the angles
            self.periods = periods.to(self.periods.device)
        return self

    def forward(self, size: Sequence[int]) -> Tuple[Tensor, Tensor]:
        """Returns cosines and sines of (P + H * W, head_dim / 2) for a map of (H, W) tokens after P prefix tokens."""
        angles = rotary_angles(self.periods, size)
        prefix = (0, 0, self.num_prefix_tokens, 0)
        return F.pad(angles.cos(), prefix, value=1.0), F.pad(angles.sin(), prefix)


def rotary_angles(periods: Tensor, size: Sequence[int]) -> Tensor:
    """Returns the angles of a map of (H, W) tokens: (H * W, 2 * len(periods))."""
    periods = at_least_float32(periods)
    y, x = ((torch.arange(n, device=periods.device, dtype=periods.dtype) + 0.5) * (2 / n) - 1 for n in size)
    y, x = (2 * math.pi * axis[:, None] / periods for axis in (y, x))  # (H, D / 4) and (W, D / 4)
    y, x = y[:, None].expand(-1, size[1], -1), x.expand(size[0], -1, -1)
    return torch.cat([y, x], -1).flatten(0, 1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys, (B, heads, N, C), by the angles of (N, C / 2), in the wider of the two types."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
