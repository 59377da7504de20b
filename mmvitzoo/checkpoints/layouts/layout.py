"""Layout: how one source names the weights of a family, as a table from its key names to ours."""

import re
from dataclasses import dataclass, field
from typing import AbstractSet, Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

from torch import Tensor

FIELDS = {'rest': '.+', 'leaf': 'weight|bias|bias_mask|running_mean|running_var|num_batches_tracked'}


@dataclass(frozen=True)
class Dropped:
    """Target of a key that is left out.

    Args:
        reason: Reason that the converter reports.
    """

    reason: str


@dataclass(frozen=True)
class Unsupported:
    """Target of a key that no model of this package has and that changes the meaning of the other weights.

    Args:
        reason: Continuation of the error message after the key.
    """

    reason: str


@dataclass(frozen=True)
class Layout:
    """Key names of one source of checkpoints.

    In a template ``{rest}`` stands for anything, ``{leaf}`` for a tensor of a layer, such as ``weight``, and any
    other field for a number.

    Args:
        family: Family of the weights, such as ``'mpvit'``.
        model_name: Name of the backbone in the registry, such as ``'MPViT'``.
        source: Name of the layout, such as ``'official'``.
        signature: Keys that every checkpoint of this layout has, and none of the layouts after it in the list.
        table: Template of an original key -> template of our whole-model key, or :class:`Dropped` or
            :class:`Unsupported`. The first match counts. Several original keys may lead to one of ours: they are
            copies and must be equal.
        postprocess: Changes values after renaming. It edits the renamed weights and the dropped keys with their
            reasons in place, and raises ValueError for weights that are missing or misshapen.
        preprocess_export: Undoes ``postprocess`` before weights are written in this layout. It takes and returns
            weights in our names.
        metadata: Arguments of the backbone that shapes do not tell and that belong to this source, such as
            ``dict(act='quick_gelu')``. Or a function of the renamed weights, before ``postprocess``, that returns them.
        assumed: Names of ``metadata`` that are customary for this source, but not certain.
        square: The position embedding belongs to a square grid, whatever the model's.
        note: Sentence for the user of a converted file, such as its license.
        absent: Keys that no checkpoint of this layout has.
    """

    family: str
    model_name: str
    source: str
    signature: Tuple[str, ...]
    table: Mapping[str, Union[str, Dropped, Unsupported]]
    postprocess: Optional[Callable[[Dict[str, Tensor], Dict[str, str]], None]] = None
    preprocess_export: Optional[Callable[[Dict[str, Tensor]], Dict[str, Tensor]]] = None
    metadata: Union[Mapping[str, Any], Callable[[Dict[str, Tensor]], Dict[str, Any]]] = field(default_factory=dict)
    assumed: Tuple[str, ...] = ()
    square: bool = False
    note: str = ''
    absent: Tuple[str, ...] = ()

    def fits(self, keys: AbstractSet[str]) -> bool:
        """Returns whether a checkpoint with these keys may have this layout."""
        return keys >= set(self.signature) and keys.isdisjoint(self.absent)

    def rules(self) -> List[Tuple['re.Pattern', Union[str, Dropped, Unsupported]]]:
        """Returns the table with its templates as regular expressions."""
        return [(re.compile(_pattern(template)), target) for template, target in self.table.items()]

    def inverse_rules(self) -> List[Tuple['re.Pattern', str]]:
        """Returns our templates as regular expressions, with the templates of this layout."""
        return [(re.compile(_pattern(ours)), theirs) for theirs, ours in self.table.items() if isinstance(ours, str)]


def unchanged(*templates: str) -> Dict[str, str]:
    """Returns a table of names that the source and this package share."""
    return {template: template for template in templates}


def backbone_under(prefix: str, table: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the table of a whole model that keeps the backbone below ``prefix``, from that of the backbone alone."""
    return {prefix + theirs: 'backbone.' + ours if isinstance(ours, str) else ours for theirs, ours in table.items()}


def part_under(prefix: str, table: Mapping[str, Any], name: str, others: Dropped) -> Dict[str, Any]:
    """Returns the table of a backbone below ``prefix``, beside parts that are left out.

    Args:
        prefix: Prefix of the backbone's keys; if it is empty, there are no other parts.
        table: Table of the backbone alone.
        name: Name of the backbone in the registry, for the error message of an unknown key.
        others: Target of the keys without the prefix.
    """
    beside = {prefix + '{rest}': Unsupported(f'is no weight of {name}'), '{rest}': others} if prefix else {}
    return {**backbone_under(prefix, table), **beside}


def _pattern(template: str) -> str:
    def group(match: 're.Match') -> str:
        return f'(?P<{match[1]}>{FIELDS.get(match[1], "[0-9]{1,4}")})'

    return re.sub(r'\\{(\w+)\\}', group, re.escape(template))
