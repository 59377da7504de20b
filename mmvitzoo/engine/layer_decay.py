"""Layer-wise learning rate decay for all toolboxes.

It requires MMPretrain. Configs that use it add ``'mmvitzoo.engine.layer_decay'`` to their ``custom_imports``.
"""

from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

try:
    from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor
except ImportError as error:
    raise ImportError(f'layer decay requires MMPretrain: mim install "mmpretrain>=1.0" ({error})') from error


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneLayerDecay(LearningRateDecayOptimWrapperConstructor):
    """MMPretrain's layer decay for models in which only backbones define ``get_layer_depth``.

    The learning rate of a layer is ``lr * layer_decay_rate**(num_layers - 1 - depth)``, as in BEiT
    (https://arxiv.org/abs/2106.08254). MMPretrain calls ``get_layer_depth`` of the model, which detectors and
    segmentors do not have. This class calls that of each backbone, wherever it is in the model: SoftTeacher has one in
    its student, other models have two. Parameters outside a backbone belong to the last layer. The options in
    ``paramwise_cfg`` are those of
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
                None: the methods of the backbones in ``module``.
            **kwargs: Further arguments of MMPretrain's method.

        Raises:
            ValueError: No backbone in the model has ``get_layer_depth``.
        """
        prefix = _without_fsdp(prefix)
        if get_layer_depth is None:
            get_layer_depth = partial(_layer_depth, _find_backbones(module))
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)


def _without_fsdp(name: str) -> str:
    return name.replace('_fsdp_wrapped_module.', '')  # FSDP inserts it into the names


def _find_backbones(model: nn.Module) -> Dict[str, nn.Module]:
    """Returns the backbones of a model by the prefixes of their parameters."""
    modules = {_without_fsdp(f'{name}.' if name else ''): module for name, module in model.named_modules()}
    found = {prefix: module for prefix, module in modules.items() if hasattr(module, 'get_layer_depth')}
    # Wrappers and MMPretrain's classifiers, which pass the call on to what they contain.
    outer = [x for x in found if any(prefix != x and prefix.startswith(x) for prefix in found)]
    if not found:
        raise ValueError(f'BackboneLayerDecay: no backbone in {type(model).__name__} has get_layer_depth')
    return {prefix: module for prefix, module in found.items() if prefix not in outer}


def _layer_depth(backbones: Dict[str, nn.Module], param_name: str) -> Tuple[int, int]:
    """Returns the depth of a parameter and the number of depths, see :meth:`.Backbone.get_layer_depth`."""
    # Outside of all backbones every one of them answers with its last depth.
    prefix = next((x for x in backbones if param_name.startswith(x)), next(iter(backbones)))
    return backbones[prefix].get_layer_depth(param_name, prefix)
