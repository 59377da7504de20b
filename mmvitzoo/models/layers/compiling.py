"""What a model asks about the program that a compiler or exporter makes of it."""

import torch

__all__ = ['is_compiling', 'known']

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:  # before torch 2.3
    from torch._dynamo import is_compiling

try:
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known
except ImportError:  # before torch 2.2
    known = bool
# known(condition) is whether a condition on sizes holds for every size of a program. Where sizes are just
# numbers, that is the condition; a plain `if` would have the program compiled again for the other case.
