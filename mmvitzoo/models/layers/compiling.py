"""Helpers for code that must behave under torch.compile, torch.export and tracing."""

import torch
from mmengine.utils import digit_version

if hasattr(torch.compiler, 'is_compiling'):
    _is_compiling = torch.compiler.is_compiling
else:  # torch < 2.3
    from torch._dynamo import is_compiling as _is_compiling

if hasattr(torch.compiler, 'is_exporting'):
    is_exporting = torch.compiler.is_exporting
else:  # torch < 2.7, whose exporters are not supported

    def is_exporting() -> bool:
        """Returns False: no supported exporter runs."""
        return False


if digit_version(torch.__version__) >= digit_version('2.11'):
    from torch.fx.experimental.symbolic_shapes import statically_known_true
else:  # not known to work inside a compiled graph in older versions
    statically_known_true = bool


def statically_true(condition: bool) -> bool:
    """Returns True only if a condition on sizes is statically known; never adds a guard.

    In eager mode this is ``bool(condition)``. A plain ``if`` would make a compiler compile the graph again for
    the other case. A tracer sees one size, and its graph serves other sizes only if no size is asked for.
    """
    if torch.jit.is_tracing():
        return False
    return statically_known_true(condition) if _is_compiling() else bool(condition)


def is_compiling() -> bool:
    """Returns whether a graph is being made by a compiler, an exporter or a tracer."""
    return _is_compiling() or torch.jit.is_tracing()
