"""Recognising a checkpoint and renaming it to this package's names."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Union

import torch
from torch import Tensor

from . import mpvit, mvitv2, scalablevit, vit, vitae
from .layout import Drop, Layout, Refuse
from .reading import CheckpointError

LAYOUTS = [*mpvit.LAYOUTS, *mvitv2.LAYOUTS, *scalablevit.LAYOUTS, *vitae.LAYOUTS, *vit.LAYOUTS]


class _Watched(dict):
    """Weights that know which of them was read last, to name it if it is not as it should be."""

    read = 'all of them'

    def __getitem__(self, key: str) -> Tensor:
        value = super().__getitem__(key)
        self.read = f'{key} of shape {tuple(value.shape)}'
        return value

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]


@dataclass
class Converted:
    """What :func:`convert` returns.

    Attributes:
        state_dict: Weights in whole-model names: ``backbone.*``, ``head.fc.*``, ``decode_head.*``.
        family: Such as ``'mpvit'``.
        source: Name of the layout that was recognised.
        backbone_cfg: Config of a backbone that these weights fit with ``strict=True``.
        dropped: Keys that were left out on purpose, with the reason.
    """

    state_dict: Dict[str, Tensor]
    family: str
    source: str
    backbone_cfg: Dict[str, Any]
    dropped: Dict[str, str] = field(default_factory=dict)

    @property
    def arch(self) -> Union[str, Dict[str, Any]]:
        """Name of the variant, or its dict if the shapes are those of no published one."""
        return self.backbone_cfg['arch']

    @property
    def backbone(self) -> Dict[str, Tensor]:
        """Weights of the backbone alone, without prefix."""
        return _without_prefix(self.state_dict)


def convert(state_dict: Dict[str, Tensor], family: Optional[str] = None, source: Optional[str] = None) -> Converted:
    """Recognises a checkpoint by its keys and shapes and renames it to this package's names.

    Args:
        state_dict: Tensors by key, as :func:`mmvitzoo.checkpoints.load` returns them.
        family: Accept only this family, such as ``'mpvit'``.
        source: Accept only this layout, such as ``'official'``.

    Returns:
        The renamed weights and what is known of them, see :class:`Converted`.

    Raises:
        CheckpointError: An unknown family or layout, keys that no rule covers or without which the
            others would mean something else, weights missing from which the variant is told, or
            copies of a shared tensor that disagree.
    """
    allowed = _layouts(family, source)
    layout = next((x for x in LAYOUTS if state_dict.keys() >= set(x.signature)), None)
    if layout is None or layout not in allowed:
        wanted = f' {family or "*"}/{source or "*"}' if family or source else ''
        found = f', but {layout.family}/{layout.source}' if layout else ''
        raise CheckpointError(
            f'the keys fit no{wanted} layout{found}; known are {_known()}; '
            f'first keys: {", ".join(list(state_dict)[:5])}'
        )

    rules = layout.rules()
    renamed: Dict[str, Tensor] = {}
    origin: Dict[str, str] = {}
    dropped: Dict[str, str] = {}
    unmatched: List[str] = []
    for key, value in state_dict.items():
        match, target = next(((m, t) for m, t in ((p.fullmatch(key), t) for p, t in rules) if m), (None, None))
        if match is None:
            unmatched.append(key)
        elif isinstance(target, Drop):
            dropped[key] = target.reason
        elif isinstance(target, Refuse):
            raise CheckpointError(f'{layout.family}/{layout.source}: {key} {target.reason}')
        else:
            name = target.format(**match.groupdict())
            if name not in renamed:
                renamed[name], origin[name] = value, key
            elif torch.equal(renamed[name], value):
                dropped[key] = 'equal copy of a shared tensor'
            else:
                raise CheckpointError(f'{origin[name]} and {key} are one shared tensor, but differ')
    if unmatched:
        raise CheckpointError(
            f'{layout.family}/{layout.source} has no rule for {len(unmatched)} keys: {", ".join(unmatched[:5])}'
        )
    empty = [name for name, value in renamed.items() if name.startswith('backbone.') and not value.numel()]
    if empty:
        raise CheckpointError(f'{layout.family}/{layout.source} with empty weights (in our names): {empty[0]}')
    weights = _Watched(renamed)
    try:
        if layout.finish:
            layout.finish(weights, dropped)
        renamed = dict(weights)
        weights = _Watched(_without_prefix(renamed))
        backbone_cfg = layout.backbone_cfg(weights)
    except Exception as error:  # whatever weights that are not as they should be make it raise
        reason = error.args[0] if isinstance(error, KeyError) else f'{weights.read}: {error}'
        raise CheckpointError(
            f'{layout.family}/{layout.source} with missing or misshapen weights (in our names): {reason}'
        ) from error
    return Converted(renamed, layout.family, layout.source, backbone_cfg, dropped)


def export(state_dict: Dict[str, Tensor], family: str, source: str) -> Dict[str, Tensor]:
    """Renames weights from this package's names to another layout, the way back of :func:`convert`.

    Args:
        state_dict: Weights in whole-model names, such as :attr:`Converted.state_dict`.
        family: Such as ``'plainvit'``.
        source: Layout to write, such as ``'timm'``.

    Returns:
        The same tensors under the other names.

    Raises:
        CheckpointError: An unknown family or layout, or weights that it has no name for.
    """
    layout = _layouts(family, source)[0]
    rules = layout.inverse_rules()
    if layout.restore:
        state_dict = layout.restore(state_dict)
    renamed: Dict[str, Tensor] = {}
    unmatched: List[str] = []
    for key, value in state_dict.items():
        match, target = next(((m, t) for m, t in ((p.fullmatch(key), t) for p, t in rules) if m), (None, None))
        if match is None:
            unmatched.append(key)
        else:
            renamed[target.format(**match.groupdict())] = value
    if unmatched:
        raise CheckpointError(f'{family}/{source} has no name for {len(unmatched)} weights: {", ".join(unmatched[:5])}')
    return renamed


def _layouts(family: Optional[str], source: Optional[str]) -> List[Layout]:
    layouts = [x for x in LAYOUTS if family in (None, x.family) and source in (None, x.source)]
    if not layouts:
        raise CheckpointError(f'no layout {family or "*"}/{source or "*"}; known are {_known()}')
    return layouts


def _known() -> str:
    return ', '.join(dict.fromkeys(f'{layout.family}/{layout.source}' for layout in LAYOUTS))


def _without_prefix(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    prefix = 'backbone.'
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
