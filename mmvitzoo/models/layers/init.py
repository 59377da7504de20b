"""Weight initialization by module type, for ``nn.Module.apply``."""

import math

from timm.layers import trunc_normal_
from torch import nn


def init_linear_weights(module: nn.Module) -> None:
    """Initializes a linear layer: weight from a truncated normal of std 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        init_transformer_weights(module)


def init_transformer_weights(module: nn.Module) -> None:
    """Initializes a linear layer or a convolution.

    Linear layers: truncated normal of std 0.02. Convolutions: normal of variance 2 / fan-out of one group
    (https://arxiv.org/abs/1502.01852; torch's ``kaiming_normal_`` counts the fan-out of all groups). Biases: 0.
    Norms keep the ones and zeros they are built with.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
