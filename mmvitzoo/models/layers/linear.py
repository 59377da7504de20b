"""Linear layers that use the faster of PyTorch's two matrix libraries where it has no way to ask for it."""

import platform
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:  # before torch 2.3
    from torch._dynamo import is_compiling

# The choice is made for x86 alone, where it was measured.
_ONEDNN = platform.machine() in ('x86_64', 'AMD64') and torch.backends.mkldnn.is_available()
_ONEDNN = _ONEDNN and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear`` whose float32 inference on a CPU runs in oneDNN.

    PyTorch hands such products to MKL, which is slower: by a third for 1000 tokens on an AMD
    processor (``tools/analysis_tools/benchmark.py``). The operator has no derivative.
    """
    if (
        not _ONEDNN
        or is_compiling()
        or torch.jit.is_tracing()
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad))
        or x.device.type != 'cpu'
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_autocast_cpu_enabled()
    ):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


class Linear(nn.Linear):
    """``nn.Linear`` with a bias, by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linears with an exact GELU between them.

    Args:
        dim: Channels of the input.
        hidden_dim: Channels between.
        out_dim: Channels of the output; None has those of the input.
    """

    def __init__(self, dim: int, hidden_dim: int, out_dim: Optional[int] = None):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, out_dim or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
