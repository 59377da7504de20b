"""Recognizes a checkpoint and renames it to this package's names.

A layout is how one source, such as timm, names the weights of one family. A source may have several, such as one for a
whole detector and one for its backbone.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import torch
from mmengine.registry import MODELS
from torch import Tensor

from ..models.backbones.base import Backbone
from ..models.backbones.timm_backbone import TimmBackbone
from ..models.backbones.vit import ACTS
from ..models.backbones.vit_weights import backbone_metadata
from .layouts import LAYOUTS, Dropped, Layout, Unsupported
from .reading import CheckpointError, with_metadata

PREFIX = 'backbone.'
# Low-rank updates, see mmvitzoo.engine.lora.
LORA_KEY = re.compile(r'.+\.lora_(down|up)\.weight')


@dataclass
class ConversionResult:
    """Result of :func:`convert`.

    Attributes:
        state_dict: Weights with the names of a whole model of this package: ``backbone.*``, ``head.fc.*``,
            ``decode_head.*``. They carry metadata that shapes do not tell.
        family: Family of the backbone, such as ``'mpvit'``.
        source: Source of the names that were recognized, such as ``'timm'``.
        backbone_cfg: Config of a backbone that loads these weights with ``strict=True``, or of the
            :class:`.TimmBackbone` that they were converted for.
        assumed: Arguments of the backbone that were guessed, with their values. Arguments that nothing tells and that
            keep their defaults, such as ``norm_eps``, are not listed.
        dropped: Keys that were left out on purpose, with the reason.
        note: Sentence for the user of a converted file, such as its license; empty if there is none.
    """

    state_dict: Dict[str, Tensor]
    family: str
    source: str
    backbone_cfg: Dict[str, Any]
    assumed: Dict[str, Any] = field(default_factory=dict)
    dropped: Dict[str, str] = field(default_factory=dict)
    note: str = ''

    @property
    def arch(self) -> Union[str, Dict[str, Any]]:
        """Name of the variant, or a dict if no published variant has these shapes."""
        return self.backbone_cfg['arch' if 'arch' in self.backbone_cfg else 'model_name']

    @property
    def description(self) -> str:
        """Variant and assumed arguments for messages, such as ``'tiny, num_heads=3 (assumed)'``."""
        return ', '.join([str(self.arch), *(f'{name}={value} (assumed)' for name, value in self.assumed.items())])

    @property
    def backbone(self) -> Dict[str, Tensor]:
        """Weights of the backbone alone, without prefix."""
        return _backbone_weights(self.state_dict)


def convert(
    state_dict: Dict[str, Tensor],
    family: Optional[str] = None,
    source: Optional[str] = None,
    act: Optional[str] = None,
) -> ConversionResult:
    """Recognizes a checkpoint by its keys and shapes and renames it to this package's names.

    Args:
        state_dict: Tensors by key, as :func:`mmvitzoo.checkpoints.load` returns them. Its attribute ``_metadata`` tells
            what shapes do not; a copy by a comprehension lacks it, and values are then assumed.
        family: Refuse files of other families than this, such as ``'mpvit'``.
        source: Refuse files of other sources than this, such as ``'official'``.
        act: Activation of a PlainViT's MLP, which no weight tells: ``'gelu'``, ``'gelu_tanh'`` or ``'quick_gelu'``.
            None is what the checkpoint says, or else what is customary for its layout.

    Returns:
        The renamed weights and the config that fits them.

    Raises:
        CheckpointError: The family or layout is unknown. A key has no rule, or the model does not support it. A weight
            has no elements. No config can be inferred, since weights are missing or misshapen. Copies of a shared
            tensor differ.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f'state_dict is a dict of tensors, got {state_dict!r}; checkpoints.load reads a file')
    refuse_lora(state_dict)
    layout = _recognize(state_dict, family, source)
    name = f'{layout.family}/{layout.source}'
    renamed, dropped = _rename(state_dict, layout)
    empty = [key for key, value in renamed.items() if key.startswith(PREFIX) and not value.numel()]
    if empty:
        raise CheckpointError(f'{name}: {empty[0]} (name after conversion) has no elements')
    own_metadata = backbone_metadata(state_dict)
    renamed = with_metadata(renamed, own_metadata)  # postprocess reads them
    try:
        # Before postprocess, which flattens Flax's biases of (heads, head_dim), for example.
        metadata = own_metadata or dict(layout.metadata(renamed) if callable(layout.metadata) else layout.metadata)
        if layout.postprocess:
            layout.postprocess(renamed, dropped)
    except ValueError as error:
        raise CheckpointError(f'{name}: {error} (name after conversion)') from error
    if act is not None:
        if act not in ACTS or layout.family != 'plainvit':
            raise CheckpointError(f'act of a plainvit is one of {", ".join(ACTS)}, got {act!r} for {layout.family}')
        metadata['act'] = act
    positions = renamed.get('backbone.pos_embed')
    if layout.square and positions is not None and positions.dim() == 3:  # infer_cfg refuses other shapes
        num_patches = positions.shape[1] - ('backbone.cls_token' in renamed)
        metadata['pos_embed_grid'] = (math.isqrt(num_patches),) * 2
    renamed = with_metadata(renamed, metadata)  # infer_cfg takes them as told by the file
    try:
        backbone_cfg, assumed = MODELS.get(layout.model_name).infer_cfg(_backbone_weights(renamed))
    except ValueError as error:
        raise CheckpointError(f'{name}: no config can be inferred from the converted weights: {error}') from error
    if not own_metadata:  # what is customary for the layout is assumed nevertheless
        customary = [key for key in layout.assumed if key in metadata and (key != 'act' or act is None)]
        assumed.update({key: metadata[key] for key in customary})
    return ConversionResult(renamed, layout.family, layout.source, backbone_cfg, assumed, dropped, layout.note)


def convert_for(backbone: Backbone, state_dict: Dict[str, Tensor]) -> ConversionResult:
    """Converts a checkpoint for a backbone: by the layouts of its family, or a :class:`.TimmBackbone` by timm's filter.

    Args:
        backbone: Backbone that is to load the weights.
        state_dict: Tensors by key, as :func:`mmvitzoo.checkpoints.load` returns them.

    Raises:
        CheckpointError: :func:`convert` refuses the file, timm's filter fails, or a weight has another shape than the
            model's.
    """
    if not isinstance(backbone, TimmBackbone):
        return convert(state_dict, family=backbone.family)
    own, name, others = backbone.model.state_dict(), backbone.model_name, {}
    for prefix in (f'{PREFIX}model.', 'model.'):  # of this package
        inside = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if inside.keys() & own.keys():
            if prefix.startswith(PREFIX):  # a detector or segmentor
                others = {key: value for key, value in state_dict.items() if not key.startswith(PREFIX)}
            state_dict = inside
            break
    try:
        weights = backbone.apply_timm_filter(state_dict)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f'timm cannot read the weights as those of {name}: {error!r}') from error
    refuse_lora(key for key in weights if key not in own)
    renamed = {f'{PREFIX}model.{key}': value for key, value in weights.items()}
    try:
        adapted = backbone.weights_to_adapt(renamed, PREFIX)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    for key, value in weights.items():
        if key in own and value.shape != own[key].shape and f'{PREFIX}model.{key}' not in adapted:
            raise CheckpointError(f'{key} has shape {tuple(value.shape)}, {name} has {tuple(own[key].shape)}')
    # No key tells the model: it is the one that loads.
    cfg, assumed = backbone.build_cfg, dict(model_name=name)
    return ConversionResult({**renamed, **others}, 'timm', 'timm', cfg, assumed, note=backbone.license_note)


def export(state_dict: Dict[str, Tensor], family: str, source: str) -> Dict[str, Tensor]:
    """Renames weights from this package's names to another layout.

    Values that :func:`convert` changed are changed back. Metadata and dropped weights are not restored.

    Args:
        state_dict: Weights with the names of a whole model, such as :attr:`ConversionResult.state_dict`.
        family: Family of the weights, such as ``'plainvit'``.
        source: Source whose names are written, such as ``'timm'``. If it has several layouts, it is the first in
            :data:`.LAYOUTS`: ``'huggingface'`` means VitDet, not ViTForImageClassification.

    Returns:
        The tensors under the names of the layout.

    Raises:
        CheckpointError: The family or layout is unknown, or has no name for some weights.
    """
    layout = _select_layouts(family, source)[0]
    rules = layout.inverse_rules()
    if layout.preprocess_export:
        state_dict = layout.preprocess_export(state_dict)
    renamed: Dict[str, Tensor] = {}
    unmatched: List[str] = []
    for key, value in state_dict.items():
        match, target = _first_match(rules, key)
        if match is None:
            unmatched.append(key)
        else:
            renamed[target.format(**match.groupdict())] = value
    if unmatched:
        raise CheckpointError(f'{family}/{source} has no name for {len(unmatched)} weights: {", ".join(unmatched[:5])}')
    return renamed


def refuse_lora(keys: Iterable[str]) -> None:
    """Raises CheckpointError if one of the keys is that of a low-rank update, without which the others are useless."""
    lora = next((key for key in keys if isinstance(key, str) and LORA_KEY.fullmatch(key)), None)
    if lora is not None:
        raise CheckpointError(f'{lora} is a low-rank update; tools/merge_lora.py merges it into the weights')


def _recognize(state_dict: Dict[str, Tensor], family: Optional[str], source: Optional[str]) -> Layout:
    allowed = _select_layouts(family, source)
    # PlainViT has timm's names: metadata tell a file of this package from timm's.
    is_own = backbone_metadata(state_dict) is not None
    layouts = [x for x in LAYOUTS if x.source == 'mmvitzoo'] if is_own else LAYOUTS
    # Among all layouts, not only the allowed ones, so that the error names the one that was found.
    layout = next((x for x in layouts if x.fits(state_dict.keys())), None)
    if layout is None or layout not in allowed:
        wanted = f' {family or "*"}/{source or "*"}' if family or source else ''
        if layout:
            raise CheckpointError(f'the keys fit no{wanted} layout, but {layout.family}/{layout.source}')
        raise CheckpointError(
            f'the keys fit no{wanted} layout; the layouts are {_layout_names()}; '
            f'first keys: {", ".join(list(state_dict)[:5])}'
        )
    return layout


def _rename(state_dict: Dict[str, Tensor], layout: Layout) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Returns the weights in our names, and the dropped keys with their reasons."""
    name = f'{layout.family}/{layout.source}'
    rules = layout.rules()
    renamed: Dict[str, Tensor] = {}
    origin: Dict[str, str] = {}
    dropped: Dict[str, str] = {}
    unmatched: List[str] = []
    for key, value in state_dict.items():
        match, target = _first_match(rules, key)
        if match is None:
            unmatched.append(key)
        elif isinstance(target, Dropped):
            dropped[key] = target.reason
        elif isinstance(target, Unsupported):
            raise CheckpointError(f'{name}: {key} {target.reason}')
        else:
            ours = target.format(**match.groupdict())  # named groups fill the template
            if ours not in renamed:
                renamed[ours], origin[ours] = value, key
            elif torch.equal(renamed[ours], value):
                dropped[key] = 'equal copy of a shared tensor'
            else:
                raise CheckpointError(f'{origin[ours]} and {key} are one shared tensor, but differ')
    if unmatched:
        raise CheckpointError(f'{name} has no rule for {len(unmatched)} keys: {", ".join(unmatched[:5])}')
    return renamed, dropped


def _first_match(rules: List[Tuple[re.Pattern, Any]], key: str) -> Tuple[Optional[re.Match], Any]:
    for pattern, target in rules:
        match = pattern.fullmatch(key)
        if match:
            return match, target
    return None, None


def _select_layouts(family: Optional[str], source: Optional[str]) -> List[Layout]:
    layouts = [x for x in LAYOUTS if family in (None, x.family) and source in (None, x.source)]
    if not layouts:
        raise CheckpointError(f'no layout {family or "*"}/{source or "*"}; the layouts are {_layout_names()}')
    return layouts


def _layout_names() -> str:
    return ', '.join(dict.fromkeys(f'{layout.family}/{layout.source}' for layout in LAYOUTS))


def _backbone_weights(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    weights = {key[len(PREFIX) :]: value for key, value in state_dict.items() if key.startswith(PREFIX)}
    return with_metadata(weights, backbone_metadata(state_dict), module='')
