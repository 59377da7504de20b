"""Layer scale."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Learned factor per channel of a residual branch (https://arxiv.org/abs/2103.17239).

    Args:
        dim: Channels.
        init_value: Initial value of the factors.
    """

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.gamma
