"""Training in shards, of which a transformer block is gathered at a time."""

from mmengine._strategy import FSDPStrategy
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.backbones import BLOCKS


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
    return recurse or isinstance(module, BLOCKS)


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """MMEngine's strategy, whose optimizer states can be loaded again.

    MMEngine (0.10.7 and before) hands them to PyTorch in an order that ended with PyTorch 2.0.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Loads what ``optim_state_dict`` returned, or an optimizer's own states.

        Args:
            state_dict: States of the whole model.
        """
        optimizer = self.optim_wrapper.optimizer
        shards = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(shards)
