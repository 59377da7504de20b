"""Partition of a map into square windows, and back."""

from typing import Optional, Sequence

import torch
from torch import Tensor

from .compiling import is_exporting, statically_true
from .padding import ceil_div, pad_to_multiple


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window_size, window_size, C).

    Maps that the window size does not divide are padded with zeros at the bottom and on the right.
    """
    batch, height, width, channels = x.shape
    rows, cols = ceil_div(height, window_size), ceil_div(width, window_size)
    x = pad_to_multiple(x, window_size)
    # einops would divide the sizes, which a compiled graph carries on as long formulas.
    x = x.view(batch, rows, window_size, cols, window_size, channels).transpose(2, 3)
    return x.reshape(batch * rows * cols, window_size, window_size, channels)


def window_unpartition(windows: Tensor, size: Sequence[int]) -> Tensor:
    """(B * windows, window_size, window_size, C) -> (B, H, W, C) for ``size`` (H, W), without the padding."""
    height, width = size
    window_size, channels = windows.shape[2:]
    rows, cols = ceil_div(height, window_size), ceil_div(width, window_size)
    x = windows.view(-1, rows, cols, window_size, window_size, channels).transpose(2, 3)
    x = x.reshape(-1, rows * window_size, cols * window_size, channels)
    if statically_true(height % window_size == 0) and statically_true(width % window_size == 0):
        return x
    if is_exporting():  # a slice of unknown size would tie the graph to the strides of the sliced map
        x = x.index_select(1, torch.arange(height, device=x.device))
        return x.index_select(2, torch.arange(width, device=x.device))
    return x.narrow(1, 0, height).narrow(2, 0, width).clone(memory_format=torch.contiguous_format)


def window_mask(size: Sequence[int], window_size: int, batch: int, device: torch.device) -> Optional[Tensor]:
    """Builds the key mask for attention that ignores the padding of windows.

    Args:
        size: (H, W) of the map.
        window_size: Side of the windows in tokens.
        batch: Number of maps, B.
        device: Device of the mask.

    Returns:
        (B * windows, 1, 1, window_size**2), True for tokens of the map; None if nothing is padded.
    """
    height, width = size
    if statically_true(height % window_size == 0) and statically_true(width % window_size == 0):
        return None
    on_map = torch.ones(1, height, width, 1, dtype=torch.bool, device=device)
    return window_partition(on_map, window_size).flatten(1)[:, None, None].repeat(batch, 1, 1, 1)
