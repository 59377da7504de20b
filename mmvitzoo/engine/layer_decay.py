"""Layer-wise learning rate decay for all toolboxes.

It requires MMPretrain. Configs that use it add ``'mmvitzoo.engine.layer_decay'`` to their ``custom_imports``.
"""

from functools import partial
from typing import Any, Callable, List, Optional, Tuple

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneLayerDecay(LearningRateDecayOptimWrapperConstructor):
    """MMPretrain's layer decay for models in which only the backbone defines ``get_layer_depth``.

    The learning rate of a layer is ``lr * layer_decay_rate**(num_layers - 1 - depth)``, as in BEiT
    (https://arxiv.org/abs/2106.08254). MMPretrain calls ``get_layer_depth`` of the model, which detectors and
    segmentors do not have. This class calls that of ``model.backbone``. Parameters outside the backbone belong to the
    last layer. The options in ``paramwise_cfg`` are those of
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
        """Adds a parameter group for each trainable parameter.

        Args:
            params: Parameter groups of the optimizer, extended in place.
            module: Model, or one of its submodules.
            prefix: Prefix of the parameter names of ``module``.
            get_layer_depth: Function that maps a parameter name to its depth and the number of layers.
                None: ``module.backbone.get_layer_depth``.
            **kwargs: Further arguments of MMPretrain's method.
        """
        prefix = prefix.replace('_fsdp_wrapped_module.', '')  # FSDP inserts it into the names
        if get_layer_depth is None:
            get_layer_depth = partial(module.backbone.get_layer_depth, prefix='backbone.')
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)
