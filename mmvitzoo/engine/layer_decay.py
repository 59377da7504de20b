"""Layer-wise learning rate decay in every toolbox; a config imports this module where it uses it."""

from functools import partial
from typing import Any, Callable, List, Optional, Tuple

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneLayerDecay(LearningRateDecayOptimWrapperConstructor):
    """MMPretrain's layer decay for models that know their depths by their backbone alone.

    The rate of a depth is ``lr * layer_decay_rate**(depths - 1 - depth)``, as in BEiT
    (https://arxiv.org/abs/2106.08254).

    MMPretrain asks the model for ``get_layer_depth``, which detectors and segmentors do not have;
    our backbones do. What is not the backbone is the last layer. ``paramwise_cfg`` is that of
    :class:`mmpretrain.engine.optimizers.LearningRateDecayOptimWrapperConstructor`.
    """

    def add_params(
        self,
        params: List[dict],
        module: nn.Module,
        prefix: str = '',
        get_layer_depth: Optional[Callable[[str], Tuple[int, int]]] = None,
        **kwargs: Any,
    ) -> None:
        """Adds a group for each parameter that is trained.

        Args:
            params: Groups of the optimizer; extended in place.
            module: The model, or a part of it.
            prefix: What stands before the module's own names.
            get_layer_depth: Full name of a parameter -> its depth and the number of depths; None
                asks ``module.backbone``.
            **kwargs: See MMPretrain's constructor.
        """
        prefix = prefix.replace('_fsdp_wrapped_module.', '')  # which FSDP puts between the names
        if get_layer_depth is None:
            get_layer_depth = partial(module.backbone.get_layer_depth, prefix='backbone.')
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)
