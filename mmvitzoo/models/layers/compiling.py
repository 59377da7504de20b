"""What a model asks about the program that a compiler or exporter makes of it."""

import torch
from mmengine.utils import digit_version

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:  # before torch 2.3
    from torch._dynamo import is_compiling

if digit_version(torch.__version__) >= digit_version('2.11'):
    from torch.fx.experimental.symbolic_shapes import statically_known_true
else:  # of older ones it is not known whether compilers accept it
    statically_known_true = bool


def known(condition: bool) -> bool:
    """Whether a condition on sizes holds for every size of a program; without a compiler, whether it holds.

    A plain ``if`` would have the program compiled again for the other case.
    """
    return statically_known_true(condition) if is_compiling() else bool(condition)
