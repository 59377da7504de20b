"""FSDP training: wrap policy by transformer block, and a strategy that resumes optimizer states."""

from mmengine._strategy import FSDPStrategy
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.backbones import BLOCKS


@FUNCTIONS.register_module()
def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Wrap policy for ``FullyShardedDataParallel`` that makes each transformer block an FSDP unit.

    Args:
        module: Module to decide about.
        recurse: True if FSDP asks whether to visit the children, which is always answered with True.
        nonwrapped_numel: Number of parameters of the module that belong to no unit yet; not used.

    Returns:
        True to visit the children or, if ``recurse`` is False, to make the module a unit.
    """
    return recurse or isinstance(module, BLOCKS)


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """MMEngine's FSDP strategy with a fix for loading optimizer states.

    MMEngine <= 0.10.7 passes the arguments of ``optim_state_dict_to_load`` in the order of PyTorch 2.0, which later
    versions changed.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Loads optimizer states.

        Args:
            state_dict: Optimizer states of the whole model, as ``optim_state_dict`` returns them.
        """
        optimizer = self.optim_wrapper.optimizer
        shards = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(shards)
