"""Padding of maps to a multiple of a window, patch or stride."""

from typing import Tuple, Union

import torch.nn.functional as F
from torch import Tensor

from .compiling import statically_true


def pad_to_multiple(x: Tensor, multiple: Union[int, Tuple[int, int]], channels_first: bool = False) -> Tensor:
    """Pads height and width with zeros at the bottom and on the right.

    Args:
        x: Map of (B, H, W, C), or of (B, C, H, W) if ``channels_first``.
        multiple: Number that divides height and width of the result, or one for each.
        channels_first: Layout of ``x``.

    Returns:
        ``x`` itself if nothing has to be padded.
    """
    height, width = x.shape[2:] if channels_first else x.shape[1:3]
    vertical, horizontal = (multiple, multiple) if isinstance(multiple, int) else multiple
    if statically_true(height % vertical == 0) and statically_true(width % horizontal == 0):
        return x
    # A rounded-up quotient stays a short formula in a compiled graph; ``-height % multiple`` does not.
    rows, cols = ceil_div(height, vertical), ceil_div(width, horizontal)
    padding = (0, cols * horizontal - width, 0, rows * vertical - height)
    return F.pad(x, padding if channels_first else (0, 0, *padding))


def ceil_div(size: int, divisor: int) -> int:
    """Divides and rounds up, also symbolic sizes."""
    return (size + divisor - 1) // divisor
