"""Arithmetic that automatic mixed precision must leave alone."""

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which operations on the device of ``x`` keep the precision of their inputs; ``x`` has any shape."""
    # Tensors without data, by which models are measured, have no autocast of their own.
    return torch.autocast('cpu' if x.device.type == 'meta' else x.device.type, enabled=False)
