"""The contract that every backbone of this package keeps."""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...checkpoints import Converted, load_pretrained
from ..layers import init_transformer_weights

MIN_SIZE = 32


class Backbone(BaseModule):
    """Arguments, freezing and initialisation that all families share.

    A family sets :attr:`arch_zoo`, builds its modules, implements :meth:`stages_to_freeze`,
    ``forward`` and ``get_layer_depth``, and ends its constructor with ``self.freeze()``.

    Args:
        arch: Name of a variant in :attr:`arch_zoo`, or a dict with the same keys as one.
        num_outputs: How many maps the family can return.
        out_indices: Which of them ``forward`` returns, in rising order.
        drop_path_rate: Stochastic depth of the last block, in [0, 1).
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages.
        norm_eval: Keep every BatchNorm in eval mode while training.
        init_cfg: MMEngine's initialisation. ``type='Pretrained'`` takes original checkpoints, too.

    Raises:
        ValueError: An argument outside these ranges; the message says what is allowed.
    """

    family: str = ''
    arch_zoo: Dict[str, Dict[str, Any]] = {}
    # Patterns of weights that a pretrained classifier lacks; they keep their initial values.
    may_lack: Tuple[str, ...] = ()
    # What initialises a module by its type, where no init_cfg does.
    init_module = staticmethod(init_transformer_weights)

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]],
        num_outputs: int,
        out_indices: Sequence[int],
        drop_path_rate: float,
        frozen_stages: int,
        norm_eval: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
    ):
        super().__init__(init_cfg)
        self.arch = self._resolve_arch(arch)
        indices = list(out_indices) if isinstance(out_indices, Sequence) else [out_indices]
        if not indices or indices != sorted(set(indices) & set(range(num_outputs))):
            raise ValueError(
                f'{self._get_name()}: out_indices is a rising sequence of numbers from 0 to {num_outputs - 1}, '
                f'got {out_indices!r}'
            )
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(
                f'{self._get_name()}: drop_path_rate is at least 0 and less than 1, got {drop_path_rate!r}'
            )
        if frozen_stages not in range(-1, indices[-1] + 2):
            raise ValueError(
                f'{self._get_name()}: frozen_stages is a number from -1 to {indices[-1] + 1}, got {frozen_stages!r}'
            )
        self.out_indices = tuple(indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    def _resolve_arch(self, arch: Union[str, Dict[str, Any]]) -> Dict[str, Any]:
        if isinstance(arch, dict):
            wanted = next(iter(self.arch_zoo.values()))
            if set(arch) != set(wanted):
                raise ValueError(
                    f'{self._get_name()}: the keys of an arch dict are {", ".join(wanted)}; '
                    f'got {", ".join(map(str, arch))}'
                )
            return dict(arch)
        if not isinstance(arch, str) or arch not in self.arch_zoo:
            raise ValueError(f'{self._get_name()}: arch is one of {", ".join(self.arch_zoo)}, or a dict, got {arch!r}')
        return dict(self.arch_zoo[arch])

    def check_input(self, x: Tensor) -> None:
        """Refuses images that no family takes.

        Args:
            x: Images, (B, 3, H, W), H and W of at least 32 pixels.

        Raises:
            ValueError: ``x`` is something else.
        """
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise ValueError(
                f'{self._get_name()}: input is (B, 3, H, W) with H and W of at least {MIN_SIZE} pixels, '
                f'got {tuple(x.shape)}'
            )

    def check_converted(self, converted: Converted) -> None:
        """Refuses weights that fit by name and shape, but mean something else here.

        Args:
            converted: A checkpoint in our names.

        Raises:
            ValueError: The message says what the weights are of.
        """

    def stages_to_freeze(self) -> List[nn.Module]:
        """The stem and the stages that are built, in the order in which ``frozen_stages`` counts them."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Takes what ``frozen_stages`` and ``norm_eval`` name out of training."""
        for module in self.stages_to_freeze()[: self.frozen_stages + 1]:
            module.eval()
            module.requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def train(self, mode: bool = True) -> 'Backbone':
        """Sets the mode of all but the frozen parts; returns itself as ``nn.Module.train`` does."""
        super().train(mode)
        if mode:
            self.freeze()
        return self

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint, or initialises as the original implementations do.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            CheckpointError: See :func:`mmvitzoo.checkpoints.load_pretrained`.
        """
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        pretrained = [config for config in configs if config.get('type') in ('Pretrained', PretrainedInit)]
        if pretrained:
            load_pretrained(self, pretrained[-1]['checkpoint'], pretrained[-1].get('prefix'))
            self.is_init = True
            return
        initialised = self.is_init
        super().init_weights()
        if not initialised and not self.init_cfg:
            self.apply(self.init_module)

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config of the backbone that has these weights.

        Args:
            state_dict: Weights of a backbone of this family, without a prefix.

        Returns:
            The config with its ``type``, and the arguments that shapes do not tell with the values assumed for them.

        Raises:
            ValueError: A weight is missing or misshapen, or the shapes are those of no variant.
        """
        raise NotImplementedError


def weight_shape(state_dict: Dict[str, Tensor], key: str, *num_dims: int) -> Tuple[int, ...]:
    """Returns the shape of a weight; raises ValueError if it is missing or has none of the numbers of dimensions."""
    if key not in state_dict:
        raise ValueError(f'{key} is missing')
    shape = tuple(state_dict[key].shape)
    if len(shape) not in num_dims:
        raise ValueError(f'{key} has shape {shape}, expected {" or ".join(map(str, num_dims))} dimensions')
    return shape


def count_weights(state_dict: Dict[str, Tensor], template: str) -> int:
    """Counts weights from number 0 on, where ``template`` has ``{}``; raises ValueError if there is none."""
    number = 0
    while template.format(number) in state_dict:
        number += 1
    if not number:
        raise ValueError(f'{template.format(0)} is missing')
    return number


def match_variant(
    arch_zoo: Dict[str, Dict[str, Any]], arch: Dict[str, Sequence], num_stages: int
) -> Union[str, Dict[str, Sequence]]:
    """Returns the name of the published variant with certain stages, or ``arch`` if there is none.

    A backbone that returns only early maps has no later stages. Then ValueError is raised if no variant matches.
    """
    for name, variant in arch_zoo.items():
        if {key: values[:num_stages] for key, values in variant.items()} == arch:
            return name
    if num_stages != 4:
        raise ValueError(f'no published variant has these {num_stages} stages, and stages.{num_stages} is missing')
    return arch
