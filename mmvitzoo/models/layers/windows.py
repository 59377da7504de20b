"""Maps cut into square windows and joined again."""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiling import is_exporting, known


def partition_windows(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window_size, window_size, C).

    What the window size does not divide is padded with zeros at the bottom and on the right.
    """
    batch, height, width, channels = x.shape
    rows, cols = number_of_windows((height, width), window_size)
    if not (known(height % window_size == 0) and known(width % window_size == 0)):
        x = F.pad(x, (0, 0, 0, cols * window_size - width, 0, rows * window_size - height))
    x = x.view(batch, rows, window_size, cols, window_size, channels).transpose(2, 3)
    return x.reshape(batch * rows * cols, window_size, window_size, channels)


def merge_windows(windows: Tensor, size: Sequence[int]) -> Tensor:
    """(B * windows, window_size, window_size, C) -> (B, H, W, C) for ``size`` (H, W), without the padding."""
    height, width = size
    window_size, channels = windows.shape[2:]
    rows, cols = number_of_windows(size, window_size)
    x = windows.view(-1, rows, cols, window_size, window_size, channels).transpose(2, 3)
    x = x.reshape(-1, rows * window_size, cols * window_size, channels)
    if known(height % window_size == 0) and known(width % window_size == 0):
        return x
    # A compiler that does not know the sizes carries on the smaller of two with slices, and with a view
    # asks how it lies in memory.
    if is_exporting():  # slices of a size that is not known would tie the program to how they lie in memory
        x = x.index_select(1, torch.arange(height, device=x.device))
        return x.index_select(2, torch.arange(width, device=x.device))
    return x.narrow(1, 0, height).narrow(2, 0, width).clone(memory_format=torch.contiguous_format)


def number_of_windows(size: Sequence[int], window_size: int) -> Tuple[int, int]:
    """Rows and columns of windows that cover a map of ``size`` (H, W)."""
    # Said outright wherever they are needed: a compiler would infer a long formula in their place.
    return (size[0] + window_size - 1) // window_size, (size[1] + window_size - 1) // window_size


def window_mask(size: Sequence[int], window_size: int, batch: int, device: torch.device) -> Optional[Tensor]:
    """Which tokens of windows lie on the map, for attention that does not see padding.

    Args:
        size: (H, W) of the map.
        window_size: Side of the windows, in tokens.
        batch: Number of maps, B.
        device: Where the mask is needed.

    Returns:
        (B * windows, 1, 1, window_size**2), True on the map; None if there is no padding.
    """
    height, width = size
    if known(height % window_size == 0) and known(width % window_size == 0):
        return None
    on_map = torch.ones(1, height, width, 1, dtype=torch.bool, device=device)
    return partition_windows(on_map, window_size).flatten(1)[:, None, None].repeat(batch, 1, 1, 1)
