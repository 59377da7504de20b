"""Maps cut into square windows and joined again."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def partition_windows(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window_size, window_size, C).

    What the window size does not divide is padded with zeros at the bottom and on the right.
    """
    batch, height, width, channels = x.shape
    if height % window_size or width % window_size:
        x = F.pad(x, (0, 0, 0, -width % window_size, 0, -height % window_size))
    x = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    return x.transpose(2, 3).reshape(-1, window_size, window_size, channels)


def merge_windows(windows: Tensor, size: Sequence[int]) -> Tensor:
    """Undoes :func:`partition_windows` for a map of ``size`` (H, W)."""
    height, width = size
    window_size = windows.shape[1]
    rows, cols = -(-height // window_size), -(-width // window_size)
    x = windows.unflatten(0, (-1, rows, cols)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width]


def window_mask(size: Sequence[int], window_size: int, batch: int, device: torch.device) -> Optional[Tensor]:
    """Which tokens of windows lie on the map, for attention that does not see padding.

    Args:
        size: (H, W) of the map.
        window_size: Side of the windows.
        batch: Maps.
        device: Where the mask is needed.

    Returns:
        (B * windows, 1, 1, window_size**2), True on the map; None if there is no padding.
    """
    height, width = size
    if height % window_size == 0 and width % window_size == 0:
        return None
    on_map = torch.ones(1, height, width, 1, dtype=torch.bool, device=device)
    return partition_windows(on_map, window_size).flatten(1)[:, None, None].repeat(batch, 1, 1, 1)
