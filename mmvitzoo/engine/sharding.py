"""What FSDP gathers at a time: a transformer block."""

from mmengine.registry import FUNCTIONS
from torch import nn

from ..models.layers import Recomputed


@FUNCTIONS.register_module()
def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """A wrap policy for ``FullyShardedDataParallel``: every block of every family is a unit of its own.

    Args:
        module: The module that is asked about.
        recurse: Whether the question is to look into it, which is always right.
        nonwrapped_numel: Parameters in it that are in no unit yet.

    Returns:
        Whether it becomes a unit.
    """
    return recurse or isinstance(module, Recomputed)
