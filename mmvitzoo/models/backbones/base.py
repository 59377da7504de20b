"""Contract of every backbone of this package."""

import math
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import init_transformer_weights
from ..layers.padding import ceil_div

# torch.fx records a call of a wrapped function instead of tracing its branches on sizes.
torch.fx.wrap('check_image')


class AttentionLayer(NamedTuple):
    """Attention layer of a backbone, for analysis.

    Attributes:
        block: Index of its block.
        stage: Stage of a pyramid, quarter of a plain backbone.
        attn_type: ``'global'``, ``'window'``, ``'scalable'``, or ``'path 3 x 3'`` and so on by MPViT's patch size.
        attn: The module.
        q_stride: Stride of the queries in pixels, or (H, W).
        k_stride: Stride of the keys in pixels, or (H, W).
        window_size: Side of the windows in pixels, or (H, W); 0 for global attention.
        num_prefix_tokens: Number of tokens before those of the map.
        overlapping_keys: Keys of a larger stride than the queries come from overlapping patches, not from patches of
            queries side by side.
    """

    block: int
    stage: int
    attn_type: str
    attn: nn.Module
    q_stride: Union[int, Tuple[int, int]]
    k_stride: Union[int, Tuple[int, int]]
    window_size: Union[int, Tuple[int, int]] = 0
    num_prefix_tokens: int = 0
    overlapping_keys: bool = True


class Backbone(BaseModule):
    """Arguments, freezing and initialization that all families share.

    A family sets :attr:`arch_zoo` and :attr:`family`, builds its modules and ends its constructor with
    ``self.finish_init()``. It implements :meth:`stage_maps`, :meth:`stages_to_freeze`, :meth:`get_layer_depth` and, for
    analysis and converters, :meth:`attention_layers` and :meth:`infer_cfg`.

    Args:
        arch: Name of a variant in :attr:`arch_zoo`, or a dict with the same keys as one.
        num_outputs: Number of maps that the family can return.
        out_indices: Indices of the maps that ``forward`` returns, in increasing order, or one index. Negative ones
            count from the end. What comes after the last one is not built.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1); it increases linearly from 0.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages.
        norm_eval: Keep every BatchNorm in eval mode during training.
        init_cfg: Initialization config of MMEngine. ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` takes
            checkpoints of the authors and of other libraries as well as converted ones.
        pretrained: Path or address of a checkpoint, short for the ``init_cfg`` above. Configs of MMSegmentation set it.
        in_channels: Channels of the images. Checkpoints for 3 channels are adapted while loading as in timm: their
            first convolution is summed for 1 channel, else repeated and multiplied by ``3 / in_channels``.

    Attributes:
        family: Name of the family, such as ``'mpvit'``.
        embed_dims: Channels, or those of each stage; as in the arch.
        num_layers: Number of blocks, or that of each stage; as in the arch.
        arch_zoo: Published variants by name.
        out_channels: Channels of every map that the family can return.
        strides: Strides of these maps in pixels.
        overlapping_patches: True for convolutions that center token i on pixel ``i * stride``, False for patches side
            by side.

    Raises:
        ValueError: An argument is outside these ranges; the message says what is allowed.
    """

    family: str = ''
    arch_zoo: Dict[str, Dict[str, Any]] = {}
    out_channels: Tuple[int, ...] = ()
    strides: Tuple[int, ...] = (4, 8, 16, 32)
    overlapping_patches: bool = True
    # Regular expressions of keys that a pretrained classifier lacks. If a file has no key of one, these weights keep
    # their initial values.
    optional_keys: Tuple[str, ...] = ()
    # Names of the convolutions of the image, as far as a model has them.
    first_convs: Tuple[str, ...] = ('patch_embed.proj',)
    # Initializes a module by its type, without an init_cfg.
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
        pretrained: Optional[str] = None,
        in_channels: int = 3,
    ):
        configs = init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]
        if not all(isinstance(config, dict) for config in configs):
            self._fail(f'init_cfg is a dict, a list of dicts or None, got {init_cfg!r}')
        if pretrained is not None:
            if init_cfg or not isinstance(pretrained, str):
                self._fail(f'pretrained is a path or address, without init_cfg beside it, got {pretrained!r}')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        super().__init__(init_cfg)
        self._check_number('in_channels', in_channels)
        self.in_channels = in_channels
        self.arch = self._resolve_arch(arch)
        self.embed_dims, self.num_layers = self.arch['embed_dims'], self.arch['num_layers']
        indices = (out_indices,) if is_number(out_indices) else out_indices
        if not isinstance(indices, Sequence) or not all(is_number(i) for i in indices):
            self._fail(f'out_indices is a sequence of numbers or one number, got {out_indices!r}')
        self.out_indices = tuple(i + num_outputs if i < 0 else i for i in indices)
        self._check_increasing('out_indices', self.out_indices, range(num_outputs), given=out_indices)
        if not is_number(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            self._fail(f'drop_path_rate is at least 0 and less than 1, got {drop_path_rate!r}')
        if not is_number(frozen_stages) or frozen_stages not in range(-1, self.out_indices[-1] + 2):
            self._fail(f'frozen_stages is a number from -1 to {self.out_indices[-1] + 1}, got {frozen_stages!r}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.no_norm = nn.Identity()

    def _resolve_arch(self, arch: Union[str, Dict[str, Any]]) -> Dict[str, Any]:
        if isinstance(arch, dict):
            keys = next(iter(self.arch_zoo.values()))
            if set(arch) != set(keys):
                self._fail(f'the keys of an arch dict are {", ".join(keys)}; got {", ".join(map(str, arch))}')
            return dict(arch)
        if not isinstance(arch, str) or arch not in self.arch_zoo:
            self._fail(f'arch is one of {", ".join(self.arch_zoo)}, or a dict, got {arch!r}')
        return dict(self.arch_zoo[arch])

    # Argument checks.

    def _fail(self, message: str) -> None:
        raise ValueError(f'{self._get_name()}: {message}')

    def _check_number(self, name: str, value: Any, least: int = 1, types: Any = int) -> None:
        if not is_number(value, types) or not least <= value < math.inf:
            number = 'an integer' if types is int else 'a number'
            self._fail(f'{name} is {number} of at least {least}, got {value!r}')

    def _check_flags(self, **flags: Any) -> None:
        for name, value in flags.items():
            if not isinstance(value, bool):
                self._fail(f'{name} is True or False, got {value!r}')

    def _check_stages(self, name: str, values: Any, num_stages: int, types: Any = int) -> None:
        if (
            not isinstance(values, Sequence)
            or len(values) != num_stages
            or not all(is_number(value, types) and value > 0 for value in values)
        ):
            self._fail(f'{name} is a positive number for each of {num_stages} stages, got {values!r}')

    def _check_increasing(
        self, name: str, values: Any, allowed: range, length: Optional[int] = None, given: Any = None
    ) -> None:
        if (
            not isinstance(values, Sequence)
            or list(values) != sorted(set(values) & set(allowed))
            or len(values) != (length or max(len(values), 1))
        ):
            numbers = f'{length} numbers' if length else 'numbers'
            given = values if given is None else given
            self._fail(
                f'{name} is an increasing sequence of {numbers} from {allowed[0]} to {allowed[-1]}, got {given!r}'
            )

    def _check_size(self, name: str, size: Any, least: int = 1) -> Tuple[int, int]:
        sides = size if isinstance(size, Sequence) else (size, size)
        if len(sides) != 2 or not all(is_number(side) and side >= least for side in sides):
            self._fail(f'{name} is a number of pixels, at least {least}, or (H, W), got {size!r}')
        return tuple(sides)

    def _check_norm_cfg(self, norm_cfg: Any) -> None:
        if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
            self._fail(f"norm_cfg is a dict such as dict(type='BN'), got {norm_cfg!r}")

    def check_input(self, x: Tensor) -> None:
        """Refuses images that the backbone does not take.

        Args:
            x: Images, (B, ``in_channels``, H, W), H and W at least one patch.

        Raises:
            ValueError: ``x`` has another shape. Or BatchNorm trains and has one value per channel to normalize.
        """
        stride = self.strides[self.out_indices[-1]] if self.norm_trains else 0
        check_image(x, self._get_name(), self.in_channels, self.strides[0], stride)

    def check_compatible(self, result: Any) -> None:
        """Refuses weights that fit by name and shape but mean something else here.

        Args:
            result: A :class:`mmvitzoo.checkpoints.ConversionResult`.

        Raises:
            ValueError: The message says which model the weights belong to.
        """

    def log_differences(self, result: Any) -> None:
        """Logs what a checkpoint tells otherwise than the model has it, where this may be intended.

        Args:
            result: A :class:`mmvitzoo.checkpoints.ConversionResult`.
        """

    def stage_maps(self, x: Tensor) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
        """Yields the output of each stage, or of each block of a plain backbone, before its output norm.

        Args:
            x: Images, (B, ``in_channels``, H, W).

        Yields:
            Map of (B, H', W', C), and the prefix tokens of (B, P, C) or None.
        """
        raise NotImplementedError

    def output_norm(self, index: int) -> nn.Module:
        """Returns the norm of the map with this index, or an identity."""
        return getattr(self, f'norm{index}', self.no_norm)

    def intermediate_norm(self, index: int) -> nn.Module:
        """Returns the norm of :meth:`forward_intermediates` for the map with this index."""
        return self.output_norm(index)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Computes the maps in ``out_indices``.

        Args:
            x: Images, (B, ``in_channels``, H, W), H and W at least one patch.

        Returns:
            For each index i a contiguous map of (B, ``out_channels[i]``, H_i, W_i); H_i and W_i are H and W divided
            by ``strides[i]``, rounded up.

        Raises:
            ValueError: ``x`` has another shape.
        """
        self.check_input(x)
        outs = []
        for i, (y, _) in enumerate(self.stage_maps(x)):
            if i in self.out_indices:
                # Contiguous: operators such as RoIAlign read the memory of a map as if it were.
                outs.append(self.output_norm(i)(y).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Union[int, Sequence[int], None] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """Computes maps of any stages or blocks that are built, as timm's method of this name does.

        Args:
            x: Images, (B, ``in_channels``, H, W), H and W at least one patch.
            indices: Indices of the maps; a number n takes the last n, None takes all.
            return_prefix_tokens: Return pairs of a map and its prefix tokens, (B, P, C), where the model has any.
            norm: Apply the output norms, as far as they are built; in a plain backbone the last norm to every map.
            stop_early: Stop after the last of ``indices``.
            output_fmt: ``'NCHW'`` or ``'NHWC'``.
            intermediates_only: Return the list of maps alone.

        Returns:
            The final features with their norm, and the list of maps. Features are a map, or (B, P + H * W, C) with
            prefix tokens.

        Raises:
            ValueError: An index is not built, or the format is another one.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            self._fail(f"output_fmt is 'NCHW' or 'NHWC', got {output_fmt!r}")
        built = self.out_indices[-1] + 1
        numbers = range(built - indices, built) if isinstance(indices, int) else indices
        wanted = list(range(built)) if numbers is None else [i + built if i < 0 else i for i in numbers]
        self._check_increasing('indices', wanted, range(built), given=indices)
        self.check_input(x)

        def layout(y: Tensor) -> Tensor:
            return y.permute(0, 3, 1, 2).contiguous() if output_fmt == 'NCHW' else y

        maps: List[Any] = []
        for i, (y, prefix) in enumerate(self.stage_maps(x)):
            final_norm = self.intermediate_norm(i)
            if i in wanted:
                map_norm = final_norm if norm else self.no_norm
                out = layout(map_norm(y))
                maps.append((out, map_norm(prefix)) if return_prefix_tokens and prefix is not None else out)
            if i == wanted[-1] and (stop_early or intermediates_only):
                break
        if intermediates_only:
            return maps
        if prefix is None:
            return layout(final_norm(y)), maps
        return final_norm(torch.cat([prefix, y.flatten(1, 2)], 1)), maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches activation checkpointing of all blocks, as timm's method of this name does.

        Args:
            enable: Value of ``with_cp``.
        """
        for module in self.modules():
            if hasattr(module, 'with_cp'):
                module.with_cp = enable

    def attention_layers(self) -> List[AttentionLayer]:
        """Returns the attention layers of all blocks in order, for analysis.

        Raises:
            ValueError: The family has none that can be analyzed.
        """
        raise ValueError(f'attention of {self._get_name()} cannot be analyzed')

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Returns the depth of a parameter, for layer-wise learning rate decay.

        Args:
            param_name: Full name of the parameter.
            prefix: Prefix of the backbone's parameters, such as ``'backbone.'``.

        Returns:
            The depth and the number of depths: 0 for patch embedding and positions, 1 to the number of blocks for the
            blocks, then output norms and everything after the backbone.
        """
        raise NotImplementedError

    def stages_to_freeze(self) -> List[List[Union[nn.Module, nn.Parameter]]]:
        """Returns the parts of the stem and of each stage that is built, in the order of ``frozen_stages``."""
        raise NotImplementedError

    def finish_init(self) -> None:
        """Freezes what ``frozen_stages`` and ``norm_eval`` say; to be called at the end of the constructor."""
        for parameter in self.parameters():
            if parameter.dim() == 4 and 1 in parameter.shape:
                keep_grad_strides(parameter)
        self.freeze()

    def freeze(self) -> None:
        """Freezes the first ``frozen_stages`` stages and keeps BatchNorm in eval mode if ``norm_eval``."""
        for parts in self.stages_to_freeze()[: self.frozen_stages + 1]:
            for part in parts:
                part.requires_grad_(False)
                if isinstance(part, nn.Module):
                    part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        self.norm_trains = any(isinstance(x, nn.BatchNorm2d) and x.training for x in self.modules())

    def train(self, mode: bool = True) -> 'Backbone':
        """Sets the mode of all parts that are not frozen.

        Args:
            mode: True for training mode, False for eval mode.

        Returns:
            The backbone itself, as ``nn.Module.train`` does.
        """
        super().train(mode)
        self.norm_trains = False
        if mode:
            self.freeze()
        return self

    def init_weights(self) -> None:
        """Loads the checkpoint of ``init_cfg``, or initializes as the original implementation does.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            CheckpointError: The checkpoint does not fit, see :func:`mmvitzoo.checkpoints.load_pretrained`.
        """
        if self.is_init:
            super().init_weights()  # warns, as every BaseModule does
            return
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        pretrained = [config for config in configs if config.get('type') in ('Pretrained', PretrainedInit)]
        if pretrained:
            from ...checkpoints import load_pretrained  # models do not depend on checkpoints

            load_pretrained(self, *(pretrained[-1].get(name) for name in ('checkpoint', 'prefix', 'key')))
            self.is_init = True
            return
        super().init_weights()
        if not self.init_cfg:
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

    @classmethod
    def infer_in_channels(cls, state_dict: Dict[str, Tensor]) -> Dict[str, int]:
        """Returns ``in_channels`` of these weights for the config of :meth:`infer_cfg`, or nothing for the default 3.

        Args:
            state_dict: Weights of a backbone of this family, without a prefix.

        Raises:
            ValueError: The first convolution is misshapen.
        """
        keys = [f'{name}.weight' for name in cls.first_convs if f'{name}.weight' in state_dict]
        in_channels = weight_shape(state_dict, keys[0], 4)[1] if keys else 3
        return {} if in_channels == 3 else dict(in_channels=in_channels)

    def weights_to_adapt(self, state_dict: Mapping[str, Tensor], prefix: str = '') -> List[str]:
        """Returns the keys of first convolutions for 3 channels, if the model has another number of channels.

        Args:
            state_dict: Weights with the names of the model.
            prefix: Prefix of the backbone's parameters, such as ``'backbone.'``.

        Raises:
            ValueError: The weights have neither 3 channels nor ``in_channels``.
        """
        keys = []
        for key in (f'{prefix}{name}.weight' for name in self.first_convs):
            weight = state_dict.get(key)
            if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[1] == self.in_channels:
                continue
            if weight.shape[1] != 3:
                self._fail(
                    f'the checkpoint is for images of {weight.shape[1]} channels, the model has '
                    f'in_channels={self.in_channels}; only checkpoints for 3 channels are adapted'
                )
            keys.append(key)
        return keys

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Adapts the first convolutions of a checkpoint for 3 channels."""
        keys = self.weights_to_adapt(state_dict, prefix)
        for key in keys:
            state_dict[key] = adapt_input_conv(self.in_channels, state_dict[key].detach())
        if keys:
            message = f'{self._get_name()}: adapted the first convolution from 3 to {self.in_channels} channels'
            print_log(message, logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)


def image_channels(model: nn.Module) -> int:
    """Returns the channels of the images of a model: 3 unless it has a backbone of this package with others."""
    return next((module.in_channels for module in model.modules() if isinstance(module, Backbone)), 3)


def check_image(x: Tensor, name: str, in_channels: int, min_size: Union[int, Tuple[int, int]], stride: int) -> None:
    """Raises ValueError unless ``x`` is (B, in_channels, H, W).

    Args:
        x: Images.
        name: Name of the backbone for the message.
        in_channels: Channels of the images.
        min_size: Minimum of H and W in pixels, or that of each.
        stride: Stride of the last map, where BatchNorm needs more than one value; 0 if none trains.
    """
    height, width = (min_size, min_size) if isinstance(min_size, int) else min_size
    if x.dim() != 4 or x.shape[1] != in_channels or x.shape[2] < height or x.shape[3] < width:
        least = height if height == width else f'{height} and {width}'
        raise ValueError(
            f'{name}: input is (B, {in_channels}, H, W) with H and W of at least {least} pixels, got {tuple(x.shape)}'
        )
    if stride and x.shape[0] * ceil_div(x.shape[2], stride) * ceil_div(x.shape[3], stride) == 1:
        raise ValueError(
            f'{name}: the last map of one image of {x.shape[2]} x {x.shape[3]} pixels is 1 x 1, where BatchNorm cannot '
            'train; use larger images, more images in a batch, or norm_eval=True'
        )


def is_number(value: Any, types: Any = int) -> bool:
    """Returns whether a value is a number of these types; a bool, which Python counts as an int, is none."""
    return isinstance(value, types) and not isinstance(value, bool)


def keep_grad_strides(parameter: nn.Parameter) -> None:
    """Gives gradients of a parameter its strides also in dimensions of size 1.

    Gradients of channels-last convolutions have other strides there, at which DDP warns and copies.
    """
    stride = parameter.stride()

    def set_strides(grad: Tensor) -> Tensor:
        return grad.as_strided(grad.shape, stride) if grad.is_contiguous() else grad

    parameter.register_hook(set_strides)


def drop_path_rates(drop_path_rate: float, num_layers: int) -> List[float]:
    """Returns the stochastic depth rate of each block (https://arxiv.org/abs/1603.09382), increasing from 0."""
    return [drop_path_rate * i / max(num_layers - 1, 1) for i in range(num_layers)]


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
