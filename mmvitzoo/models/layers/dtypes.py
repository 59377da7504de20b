"""Precision of sensitive parts."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32, and leaves float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
