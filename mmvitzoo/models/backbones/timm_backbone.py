"""Models of timm as backbones, with the contract of this package.

timm (https://github.com/huggingface/pytorch-image-models) builds the model, and its ``forward_intermediates`` computes
the maps. This file adds what detectors and segmentors need: images of any size, contiguous (B, C, H, W) maps, freezing,
layer-wise learning rate decay, and checkpoints that are read without executing code.
"""

import difflib
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.utils import digit_version
from timm.models import group_parameters, model_entrypoint
from torch import Tensor, nn

from ..layers.padding import pad_to_multiple
from .base import Backbone, is_number

# Modules of timm that mark their models as fixed in size, although their maps have the size of any image.
ANY_SIZE = ('efficientvit_msra', 'sequencer', 'swiftformer', 'twins', 'vision_transformer_sam', 'xcit')


@MODELS.register_module()
class TimmBackbone(Backbone):
    """Any model of timm that has intermediate maps, such as Swin V2, ConvNeXt V2, EVA-02, SAM 2 or SigLIP 2.

    Images are padded with zeros at the bottom and on the right to a multiple of the largest stride. Models that
    resample their positions (``dynamic_img_size`` in timm) take images of any size. Others, such as BEiT, Hiera and
    MaxViT, take the size that they are built for: ``img_size``, or else the size of their pretraining.

    All maps of a plain model have the same stride. A detector then needs :class:`.SimpleFeaturePyramid` as its neck,
    which builds the levels from the last map.

    Args:
        model_name: Name in timm, with or without a tag of pretrained weights:
            ``'swinv2_base_window8_256.ms_in1k'``. ``timm.list_models('*swinv2*')`` lists names.
        out_indices: Indices of the maps that are returned, see :class:`.Backbone`: stages of a pyramid, blocks of a
            plain model. None: the last four stages, or the last block.
        img_size: Side, or (H, W), in pixels that the model is built for, multiples of its largest stride. Models that
            take any size have their table of positions, if any, for this size. None: the size of the pretraining. Swin
            V2 shifts no windows in stages with one window at this size, unless ``always_partition=True``.
        pretrained: True downloads the weights that timm lists for the name. A path or address is short for
            ``init_cfg``.
        in_channels: Channels of the images, see :class:`.Backbone`.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1), see :class:`.Backbone`.
        frozen_stages: -1 trains everything. 0 freezes the stem, k also the first k groups of timm's ``group_matcher``,
            which are blocks in most models, not stages as in MMDetection's Swin. Models without one have a group for
            each stage.
        norm_eval: Keep every BatchNorm in eval mode during training.
        with_cp: Use timm's activation checkpointing in training.
        norm_outputs: Apply the last norm of the model to all maps that have its channels. All maps of a plain model do.
        init_cfg: Initialization config of MMEngine. ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` takes a file
            with timm's names or with any names that timm's own filter of the model renames.
        **kwargs: Further arguments of the model in timm, such as ``patch_size=16``.

    Raises:
        ValueError: The name is unknown, the model has no intermediate maps, or an argument is not allowed.
        ImportError: timm is older than 1.0.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import TimmBackbone
        >>> model = TimmBackbone('pvt_v2_b0').eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 90))]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    family = 'timm'

    def __init__(
        self,
        model_name: str,
        out_indices: Optional[Sequence[int]] = None,
        img_size: Union[int, Sequence[int], None] = None,
        pretrained: Union[bool, str, None] = False,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_outputs: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
        **kwargs: Any,
    ):
        if digit_version(timm.__version__) < digit_version('1.0.0'):
            raise ImportError(f'TimmBackbone requires timm >= 1.0, found {timm.__version__}: pip install "timm>=1.0"')
        if pretrained is True and init_cfg:
            self._fail('weights come from pretrained=True or from init_cfg, not from both')
        self._check_name(model_name)
        self._check_number('in_channels', in_channels)
        for name in ('checkpoint_path', 'features_only', 'in_chans', 'num_classes'):
            if name in kwargs:
                self._fail(
                    f'{name} is not an argument; init_cfg loads checkpoints, out_indices selects maps, in_channels is '
                    'the number of channels'
                )
        kwargs['in_chans'] = in_channels
        if img_size is not None:
            kwargs['img_size'] = self._check_size('img_size', img_size)
        if drop_path_rate:
            kwargs['drop_path_rate'] = drop_path_rate
        model, kwargs = self._create(model_name, pretrained is True, kwargs)
        strides = [info['reduction'] for info in model.feature_info]
        channels = [info['num_chs'] for info in model.feature_info]
        self.is_plain = len(set(strides)) == 1
        groups = layer_groups(model)
        arch = dict(embed_dims=channels[-1] if self.is_plain else tuple(channels), num_layers=max(groups.values()) - 1)
        if out_indices is None:
            out_indices = (-1,) if self.is_plain else tuple(range(-min(4, len(strides)), 0))
        path = pretrained if isinstance(pretrained, str) else None
        super().__init__(arch, len(strides), out_indices, drop_path_rate, -1, norm_eval, init_cfg, path, in_channels)
        if self.is_plain and self.out_indices == (0, 1, 2, 3) and len(strides) > 4:
            self._fail(
                f'{model_name} is plain: 0, 1, 2, 3 are the first of its {len(strides)} blocks, all of stride '
                f'{strides[0]}. For a pyramid, take its last map and neck=dict(type="SimpleFeaturePyramid")'
            )
        self.model_name = model_name
        self.timm_args = kwargs
        self.timm_weights = pretrained is True
        self.norm_outputs = norm_outputs
        self.strides, self.out_channels = tuple(strides), tuple(channels)
        self.multiple = max(strides)
        self.fixed_size = self._get_fixed_size(model)
        if norm_outputs:
            if isinstance(getattr(model, 'norm', nn.Identity()), nn.Identity):
                self._fail(f'norm_outputs applies the last norm of a model, which {model_name} does not have')
            self.out_channels = tuple(info.get('num_chs_norm', info['num_chs']) for info in model.feature_info)
        self.layer_groups = groups
        first_convs = model.pretrained_cfg.get('first_conv') or ()
        names = (first_convs,) if isinstance(first_convs, str) else first_convs
        self.first_convs = tuple(f'model.{name}' for name in names)
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=not norm_outputs, prune_head=True)
        model.is_init = True  # otherwise BaseModule.init_weights calls timm's after its own
        self.model = model
        self.set_grad_checkpointing(with_cp)
        num_groups = max(groups[name] for name, _ in model.named_parameters())
        if not is_number(frozen_stages) or frozen_stages not in range(-1, num_groups + 1):
            self._fail(f'frozen_stages is a number from -1 to {num_groups} for {model_name}, got {frozen_stages!r}')
        self.frozen_stages = frozen_stages
        if self.is_plain:
            log(f'{model_name} is plain: all maps have stride {strides[0]}, levels need SimpleFeaturePyramid')
        if self.timm_weights:
            log(f'timm loaded the weights; {self.license_note}')
        self.finish_init()

    def _resolve_arch(self, arch: Dict[str, Any]) -> Dict[str, Any]:
        return arch

    def _check_name(self, model_name: Any) -> None:
        if not isinstance(model_name, str):
            self._fail(f'model_name is a name in timm, got {model_name!r}')
        name = model_name.partition('.')[0]
        if ':' not in model_name and not timm.is_model(name):  # timm resolves hf-hub:NAME and local-dir:PATH
            models = timm.list_models()
            start = name.replace('_', '')  # swin_v2_tiny for swinv2_tiny_window8_256
            similar = [x for x in models if start and x.replace('_', '').startswith(start)][:5]
            similar = similar or difflib.get_close_matches(name, models, n=5)
            hint = f'did you mean {" or ".join(similar)}?' if similar else 'timm.list_models() lists the names'
            self._fail(f'timm {timm.__version__} has no model {model_name!r}; {hint}')

    def _create(self, model_name: str, pretrained: bool, kwargs: Dict[str, Any]) -> Tuple[nn.Module, Dict[str, Any]]:
        """Returns the whole model and the arguments that it was built with."""
        try:
            args = {'dynamic_img_size': True, **kwargs}
            try:
                model = build(model_name, pretrained, args)
            except TypeError as error:
                if 'dynamic_img_size' in kwargs or 'dynamic_img_size' not in str(error):
                    raise
                args = kwargs
                model = build(model_name, pretrained, args)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f'{self._get_name()}: timm cannot build {model_name}: {one_line(error)}') from None
        if not hasattr(model, 'prune_intermediate_layers') or not getattr(model, 'feature_info', None):
            self._fail(f'{model_name} has no intermediate maps in timm {timm.__version__}')
        return model, args

    def _get_fixed_size(self, model: nn.Module) -> Optional[Tuple[int, int]]:
        """Returns the only size of images that the model takes, or None if it takes any."""
        family = type(model).__module__.rpartition('.')[2]
        if (
            not model.pretrained_cfg.get('fixed_input_size')
            or self.timm_args.get('dynamic_img_size')
            or family in ANY_SIZE
        ):
            return None
        size = tuple(self.timm_args.get('img_size', model.pretrained_cfg['input_size'][1:]))
        if any(side % self.multiple for side in size):
            self._fail(f'img_size of {self.model_name} is two multiples of {self.multiple}, got {size}')
        return size

    @property
    def build_cfg(self) -> Dict[str, Any]:
        """Config that builds this backbone."""
        names = ('model_name', 'out_indices', 'in_channels', 'norm_outputs')
        timm_args = {name: value for name, value in self.timm_args.items() if name != 'in_chans'}
        return dict(type='TimmBackbone', **{name: getattr(self, name) for name in names}, **timm_args)

    @property
    def license_note(self) -> str:
        """Sentence about the license of the weights that timm lists for this model."""
        return f'timm names the license {self.model.pretrained_cfg.get("license") or "unknown"} for {self.model_name}'

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Computes the maps in ``out_indices``.

        Args:
            x: Images, (B, ``in_channels``, H, W), H and W at least one patch.

        Returns:
            For each index i a contiguous map of (B, ``out_channels[i]``, H' / ``strides[i]``, W' / ``strides[i]``).
            H' and W' are H and W rounded up to multiples of the largest stride.

        Raises:
            ValueError: ``x`` has another shape, or another size than a model of fixed size takes.
        """
        self.check_input(x)
        return tuple(y.contiguous() for y in self._compute_maps(x, self.out_indices))

    def _compute_maps(self, x: Tensor, indices: Sequence[int]) -> List[Tensor]:
        x = pad_to_multiple(x, self.multiple, channels_first=True)
        if self.fixed_size is not None and tuple(x.shape[2:]) != self.fixed_size:
            self._fail(
                f'{self.model_name} takes images of {self.fixed_size[0]} x {self.fixed_size[1]} pixels, got '
                f'{x.shape[2]} x {x.shape[3]} after padding to multiples of {self.multiple}; img_size=(H, W) builds '
                'it for another size'
            )
        return self.model.forward_intermediates(
            x, indices=list(indices), norm=self.norm_outputs, output_fmt='NCHW', intermediates_only=True
        )

    def stage_maps(self, x: Tensor) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
        for y in self._compute_maps(x, range(self.out_indices[-1] + 1)):
            yield y.permute(0, 2, 3, 1), None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.with_cp = enable
        self._checkpoint_in(self.training)

    def _checkpoint_in(self, training: bool) -> None:
        try:
            self.model.set_grad_checkpointing(self.with_cp and training)
        except (AssertionError, AttributeError):
            if self.with_cp:
                self._fail(f'{self.model_name} has no activation checkpointing in timm')

    def train(self, mode: bool = True) -> 'Backbone':
        super().train(mode)
        self._checkpoint_in(mode)
        return self

    def stages_to_freeze(self) -> List[List[Union[nn.Module, nn.Parameter]]]:
        stages: List[List[Union[nn.Module, nn.Parameter]]] = [[] for _ in range(max(self.layer_groups.values()) + 1)]

        def collect(module: nn.Module, prefix: str) -> None:
            found = {self._group_of(f'{prefix}{name}') for name, _ in module.named_parameters()}
            if len(found) == 1:  # with layers that have no parameters, such as dropout
                stages[found.pop()].append(module)
                return
            for name, parameter in module.named_parameters(recurse=False):
                stages[self._group_of(f'{prefix}{name}')].append(parameter)
            for name, child in module.named_children():
                collect(child, f'{prefix}{name}.')

        if self.frozen_stages >= 0:
            collect(self.model, '')
        return stages

    def _group_of(self, name: str) -> int:
        """Returns the group of a parameter; one that was added later belongs to the group of its module."""
        if name in self.layer_groups:
            return self.layer_groups[name]
        module = name.rpartition('.')[0]
        while module:
            groups = [group for other, group in self.layer_groups.items() if other.startswith(f'{module}.')]
            if groups:
                return groups[0]
            module = module.rpartition('.')[0]
        return max(self.layer_groups.values())

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Returns the depth of a parameter by timm's ``group_matcher``, for layer-wise learning rate decay.

        Args:
            param_name: Full name of the parameter.
            prefix: Prefix of the backbone's parameters, such as ``'backbone.'``.

        Returns:
            The depth and the number of depths: 0 for the stem, then the groups of the matcher. The last depth is that
            of timm's classifier and of everything after the backbone.
        """
        last, own = max(self.layer_groups.values()), f'{prefix}model.'
        return (self._group_of(param_name[len(own) :]) if param_name.startswith(own) else last), last + 1

    def init_weights(self) -> None:
        """Loads the checkpoint of ``init_cfg``; otherwise timm has loaded or initialized the weights.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            CheckpointError: The checkpoint does not fit, see :func:`mmvitzoo.checkpoints.load_pretrained`.
        """
        if self.init_cfg or self.is_init:
            super().init_weights()
        self.is_init = True

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Resamples positions of another size, which a file of this package may have."""
        own, prefix_of_model = getattr(self.model, 'pos_embed', None), f'{prefix}model.'
        loaded = state_dict.get(f'{prefix_of_model}pos_embed')
        if own is not None and loaded is not None and loaded.shape != own.shape:
            start = len(prefix_of_model)
            weights = {key[start:]: value for key, value in state_dict.items() if key.startswith(prefix_of_model)}
            weights = self.apply_timm_filter(weights)
            state_dict.update({f'{prefix_of_model}{key}': value for key, value in weights.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def apply_timm_filter(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Renames and resamples a checkpoint as timm does for this model.

        Args:
            state_dict: Weights with timm's names, or with those of another source that timm's filter knows.

        Returns:
            Weights with timm's names and the shapes of the whole model, also those that this backbone does not have.
        """
        entry_point = model_entrypoint(self.model.pretrained_cfg['architecture'])
        filter_fn: Optional[Callable] = getattr(sys.modules[entry_point.__module__], 'checkpoint_filter_fn', None)
        if filter_fn is None:
            return state_dict
        # Filters need the whole model, and the one here is pruned.
        return filter_fn(state_dict, build(self.model_name, False, self.timm_args))


def build(model_name: str, pretrained: bool, kwargs: Dict[str, Any]) -> nn.Module:
    """Builds a whole model of timm; its classifier of one class has the last group of ``group_matcher``."""
    return timm.create_model(model_name, pretrained=pretrained, num_classes=1, **kwargs)


def layer_groups(model: nn.Module) -> Dict[str, int]:
    """Returns the group of each parameter of a whole model by timm's ``group_matcher``.

    Models without one have group 0 for the stem, then one for each stage, and one for the rest.
    """
    if hasattr(model, 'group_matcher'):
        return group_parameters(model, model.group_matcher(), reverse=True)
    stages = [info['module'] for info in model.feature_info]
    groups, group = {}, 0
    for name, _ in model.named_parameters():
        inside = [i for i, stage in enumerate(stages, 1) if name.startswith(f'{stage}.')]
        if inside:
            group = inside[0]
        elif group:
            group = len(stages) + 1
        groups[name] = group
    return groups


def one_line(error: Exception) -> str:
    """Returns the first line of an error message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def log(message: str) -> None:
    """Logs a message of this backbone."""
    print_log(f'TimmBackbone: {message}', logger='current')
