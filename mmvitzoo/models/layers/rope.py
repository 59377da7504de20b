"""Rotary position embedding on maps.

RoFormer: Su et al., https://arxiv.org/abs/2104.09864
DINOv3: Siméoni et al., https://arxiv.org/abs/2508.10104
Perception Encoder: Bolya et al., https://arxiv.org/abs/2504.13181
RoPE-ViT: Heo et al., ECCV 2024, https://arxiv.org/abs/2403.13298

With D channels of a head, a token with the coordinates (y, x) has the angles y f_c + x g_c, c = 0 .. D / 2 - 1. Each
angle rotates a pair of channels of queries and keys, so that their product depends on differences of coordinates.
Axial frequencies are 1 / p_k for one axis and 0 for the other, with the periods p_k = base^(2k / (D / 2)),
k = 0 .. D / 4 - 1. Mixed frequencies are learned for each head of each block.

The token in row i of H has these coordinates, and likewise in its column:

- normalized: y = 2 pi (2 (i + 0.5) / H - 1);
- index: y = i;
- scaled: y = i G / H, with G rows in pretraining. In Perception Encoder with a class token, i starts at 1.
"""

import math
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import at_least_float32

# torch.fx records calls of wrapped functions instead of tracing their branches on sizes.
torch.fx.wrap('axial_freqs')
torch.fx.wrap('rotary_angles')


class RopeType(NamedTuple):
    """Convention of rotary positions.

    Args:
        base: Ratio of the periods; of mixed frequencies, when they are initialized.
        coords: ``'normalized'``, ``'index'`` or ``'scaled'``, see the module.
        x_first: The first half of the angles belongs to columns, not to rows.
        interleaved: Pairs are channels 2c and 2c + 1 instead of c and c + D / 2.
    """

    base: float
    coords: str
    x_first: bool
    interleaved: bool = True


ROPE_TYPES = dict(
    dinov3=RopeType(100.0, 'normalized', x_first=False, interleaved=False),
    pe=RopeType(10000.0, 'scaled', x_first=True),
    sbb=RopeType(10000.0, 'scaled', x_first=False),
    axial=RopeType(100.0, 'index', x_first=True),
    mixed=RopeType(10.0, 'index', x_first=True),
)


class RotaryPositions(nn.Module):
    """Cosines and sines of the angles of all tokens.

    Args:
        head_dim: Channels of a head, a multiple of 4.
        num_prefix_tokens: Number of tokens before those of the map, which are not rotated.
        rope_type: Key of :data:`ROPE_TYPES`.
        offset: First index of rows and columns.
        grid: (H, W) in tokens of the images of pretraining, for scaled coordinates.
        num_heads: Number of heads, for mixed frequencies.
        num_layers: Number of blocks, for mixed frequencies.

    Attributes:
        periods: Buffer of (head_dim / 4,), at least float32; axial frequencies only. Checkpoints of the DINOv3 authors
            hold periods that were rounded to bfloat16, and these are used as they are.
        freqs: Parameter of (2, num_layers, num_heads, head_dim / 2); mixed frequencies only.
        grid: Buffer of (2,), at least float32; scaled coordinates only. A model for images of another size takes the
            grid of its checkpoint.
    """

    def __init__(
        self,
        head_dim: int,
        num_prefix_tokens: int = 0,
        rope_type: str = 'dinov3',
        offset: int = 0,
        grid: Sequence[int] = (1, 1),
        num_heads: int = 1,
        num_layers: int = 1,
    ):
        super().__init__()
        self.num_prefix_tokens, self.offset = num_prefix_tokens, offset
        self.rope_type = ROPE_TYPES[rope_type]
        self.is_mixed = rope_type == 'mixed'
        periods = self.rope_type.base ** (torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4))
        if self.is_mixed:
            self.freqs = nn.Parameter(random_freqs(periods, num_layers, num_heads))
        else:
            self.register_buffer('periods', periods)
        is_scaled = self.rope_type.coords == 'scaled'
        self.register_buffer('grid', torch.tensor(grid, dtype=torch.float32) if is_scaled else None)

    def _apply(self, fn: Any, *args: Any) -> 'RotaryPositions':
        buffers = dict(self.named_buffers())
        super()._apply(fn, *args)
        for name, buffer in buffers.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.float16, torch.bfloat16):  # model.half() would round the angles
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, size: Sequence[int], block: int = 0) -> Tuple[Tensor, Tensor, bool]:
        """Returns the rotation of :func:`apply_rotary` for a map of (H, W) tokens after P prefix tokens.

        Its cosines and sines are (P + H * W, head_dim / 2) for all blocks, or (num_heads, P + H * W, head_dim / 2) with
        mixed frequencies for one block.
        """
        freqs = self.freqs[:, block] if self.is_mixed else axial_freqs(self.periods)
        coords, x_first = self.rope_type.coords, self.rope_type.x_first
        angles = rotary_angles(freqs, size, coords, x_first, self.offset, self.grid)
        prefix = (0, 0, self.num_prefix_tokens, 0)
        cos, sin = F.pad(angles.cos(), prefix, value=1.0), F.pad(angles.sin(), prefix)
        return cos, sin, self.rope_type.interleaved


def axial_freqs(periods: Tensor) -> Tensor:
    """(D / 4,) -> (2, D / 2): frequencies of the first axis and zeros, then zeros and those of the second axis."""
    freqs = 1 / at_least_float32(periods)
    return torch.stack([F.pad(freqs, (0, len(freqs))), F.pad(freqs, (len(freqs), 0))])


def random_freqs(periods: Tensor, num_layers: int, num_heads: int) -> Tensor:
    """(D / 4,) -> (2, num_layers, num_heads, D / 2): two directions for each head, at right angles."""
    direction = 2 * math.pi * torch.rand(num_layers, num_heads, 1)
    direction = torch.cat([direction, direction + math.pi / 2], -1)[..., None]
    return torch.stack([direction.cos() / periods, direction.sin() / periods]).flatten(-2)


def rotary_angles(
    freqs: Tensor, size: Sequence[int], coords: str, x_first: bool, offset: int = 0, grid: Optional[Tensor] = None
) -> Tensor:
    """Returns the angles of the tokens of a map.

    Args:
        freqs: Frequencies of the first and the second axis, (2, ..., C).
        size: (H, W) in tokens.
        coords: Kind of coordinates, see :class:`RopeType`.
        x_first: The first axis runs along columns.
        offset: First index of rows and columns.
        grid: (2,), H and W in pretraining, for scaled coordinates.

    Returns:
        (..., H * W, C).
    """
    freqs = at_least_float32(freqs)
    axes = [torch.arange(n, device=freqs.device, dtype=freqs.dtype) + offset for n in size]
    if coords == 'normalized':
        axes = [2 * math.pi * ((axis + 0.5) * (2 / n) - 1) for axis, n in zip(axes, size)]
    elif coords == 'scaled':
        axes = [axis / n * pretrained for axis, n, pretrained in zip(axes, size, grid)]
    y, x = axes[0][:, None, None], axes[1][:, None]
    first, second = (x, y) if x_first else (y, x)
    freqs = freqs[..., None, None, :]
    return (first * freqs[0] + second * freqs[1]).flatten(-3, -2)  # (..., H, W, C) -> (..., H * W, C)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates queries or keys, (B, heads, N, C), in the wider of the two types.

    Interleaved pairs are returned as halves: the order of channels is the same in queries and keys, and products do not
    depend on it.

    Args:
        x: (B, heads, N, C).
        cos: (N, C / 2) or (heads, N, C / 2).
        sin: (N, C / 2) or (heads, N, C / 2).
        interleaved: Rotate pairs of neighbors instead of channels of both halves.
    """
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
