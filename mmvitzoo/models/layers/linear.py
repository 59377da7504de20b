"""Linear layers that use the faster of PyTorch's two matrix libraries where it has no way to ask for it."""

import platform
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiling import is_compiling

# Elements between the linears of an MLP that exist at one time in inference: few enough that the
# memory of one part serves the next, instead of new pages of the system's.
HIDDEN_ELEMENTS = 2**22

# The choice is made for x86 alone, where it was measured.
_ONEDNN = platform.machine() in ('x86_64', 'AMD64') and torch.backends.mkldnn.is_available()
_ONEDNN = _ONEDNN and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def runs_in_onednn(x: Tensor, *parameters: Optional[Tensor]) -> bool:
    """Whether :func:`linear` takes oneDNN: float32 inference on a CPU.

    Args:
        x: The input, of any shape.
        *parameters: All that it meets, a weight first.
    """
    return (
        _ONEDNN
        and not is_compiling()
        and not (torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *parameters)))
        and x.device.type == 'cpu'
        and x.dtype == parameters[0].dtype == torch.float32
        and not torch.is_autocast_cpu_enabled()
    )


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], gelu: bool = False) -> Tensor:
    """``F.linear``, with an exact GELU if asked for, whose float32 inference on a CPU runs in oneDNN.

    PyTorch hands such products to MKL, which is slower: by a third for 1000 tokens on an AMD
    processor (``tools/analysis_tools/benchmark.py``). oneDNN applies the GELU while results are
    still near the processor. The operator has no derivative.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        gelu: Apply the GELU (https://arxiv.org/abs/1606.08415).

    Returns:
        (..., out_features).
    """
    if runs_in_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu' if gelu else 'none', [], 'none')
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def split_linear(layer: nn.Module, x: Tensor, parts: int) -> List[Tensor]:
    """``layer(x).chunk(parts, -1)``, but each part lies in memory for itself.

    What stands in for a :class:`Linear`, such as an adapter, is called as it is.

    Args:
        layer: (..., in_features) -> (..., out_features).
        x: (..., in_features).
        parts: A divisor of ``out_features``.

    Returns:
        ``parts`` tensors of (..., out_features / parts).
    """
    if type(layer) is not Linear:
        return list(layer(x).chunk(parts, -1))
    return [linear(x, *parameters) for parameters in zip(layer.weight.chunk(parts), layer.bias.chunk(parts))]


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
        self.fc2 = Linear(hidden_dim, out_dim or dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out_dim)."""
        fc1, fc2 = self.fc1, self.fc2
        # An adapter, or whatever stands in for a layer, is called as it is.
        if not type(fc1) is type(fc2) is Linear or not runs_in_onednn(x, *self.parameters()):
            return fc2(F.gelu(fc1(x)))
        tokens = x.flatten(0, -2)
        parts = -(-len(tokens) * fc1.out_features // HIDDEN_ELEMENTS)
        out = [fc2(linear(part, fc1.weight, fc1.bias, gelu=True)) for part in tokens.chunk(parts)]
        return (out[0] if parts == 1 else torch.cat(out)).unflatten(0, x.shape[:-1])
