"""What a model asks about the program that a compiler or exporter makes of it."""

import torch
from mmengine.utils import digit_version

if hasattr(torch.compiler, 'is_compiling'):
    _is_compiling = torch.compiler.is_compiling
else:  # before torch 2.3
    from torch._dynamo import is_compiling as _is_compiling

if hasattr(torch.compiler, 'is_exporting'):
    is_exporting = torch.compiler.is_exporting
else:  # before torch 2.7, whose exporters are not supported

    def is_exporting() -> bool:
        """Whether an exporter makes a program: none that is supported."""
        return False


if digit_version(torch.__version__) >= digit_version('2.11'):
    from torch.fx.experimental.symbolic_shapes import statically_known_true
else:  # of older ones it is not known whether compilers accept it
    statically_known_true = bool


def is_compiling() -> bool:
    """Whether a program is being made: by a compiler, an exporter or a tracer."""
    return _is_compiling() or torch.jit.is_tracing()


def known(condition: bool) -> bool:
    """Whether a condition on sizes holds for every size of a program; without a program, whether it holds.

    A plain ``if`` would have the program compiled again for the other case. A tracer knows one size alone,
    and its program serves others only if it asks about none.
    """
    if torch.jit.is_tracing():
        return False
    return statically_known_true(condition) if _is_compiling() else bool(condition)
