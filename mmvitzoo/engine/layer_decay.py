"""Layer-wise learning rate decay in every toolbox; a config imports this module where it uses it."""

from functools import partial
from typing import Callable, List, Optional

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneLayerDecay(LearningRateDecayOptimWrapperConstructor):
    """MMPretrain's layer decay for models that know their depths by their backbone alone.

    MMPretrain asks the model for ``get_layer_depth``, which detectors and segmentors do not have;
    our backbones do. What is not the backbone is the last layer. ``paramwise_cfg`` is that of
    :class:`mmpretrain.engine.optimizers.LearningRateDecayOptimWrapperConstructor`.
    """

    def add_params(
        self,
        params: List[dict],
        module: nn.Module,
        prefix: str = '',
        get_layer_depth: Optional[Callable] = None,
        **kwargs,
    ) -> None:
        if get_layer_depth is None:
            get_layer_depth = partial(module.backbone.get_layer_depth, prefix='backbone.')
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)
