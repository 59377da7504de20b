"""How a family's weights are spelled: tables from original key names to ours."""

import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

from torch import Tensor

FIELDS = {'rest': '.+', 'leaf': r'\w+'}


@dataclass(frozen=True)
class Drop:
    """In a table: a key that is left out, and why."""

    reason: str


@dataclass(frozen=True)
class Refuse:
    """In a table: a key that no model here has, and without which the others mean something else."""

    reason: str


@dataclass(frozen=True)
class Layout:
    """One spelling of a family's weights.

    In a template ``{rest}`` stands for anything, ``{leaf}`` for the last part of a key, and any
    other field for a number.

    Args:
        family: Name of the family, such as ``'mpvit'``.
        source: Name of the spelling, such as ``'official'``.
        signature: Keys that every checkpoint of this layout has, and none of the layouts that
            come after it in the list.
        table: Template of an original key -> template of ours in whole-model names, or a
            :class:`Drop` or :class:`Refuse`. The first that fits counts. Several original keys may lead to one of
            ours: they are copies and must agree.
        backbone_cfg: Config that builds the backbone, from the renamed weights of the backbone.
        finish: Changes values, not names: takes the renamed weights and the keys that were dropped
            with their reasons, and edits both in place.
        restore: Undoes ``finish`` before weights are written in this layout: takes and returns
            weights in our names.
    """

    family: str
    source: str
    signature: Tuple[str, ...]
    table: Mapping[str, Union[str, Drop, Refuse]]
    backbone_cfg: Callable[[Dict[str, Tensor]], Dict[str, Any]]
    finish: Optional[Callable[[Dict[str, Tensor], Dict[str, str]], None]] = None
    restore: Optional[Callable[[Dict[str, Tensor]], Dict[str, Tensor]]] = None

    def rules(self) -> List[Tuple['re.Pattern', Union[str, Drop, Refuse]]]:
        """The table with its templates as regular expressions."""
        return [(re.compile(_pattern(template)), target) for template, target in self.table.items()]

    def inverse_rules(self) -> List[Tuple['re.Pattern', str]]:
        """Ours as regular expressions -> templates of this layout."""
        return [(re.compile(_pattern(ours)), theirs) for theirs, ours in self.table.items() if isinstance(ours, str)]


def backbone_under(prefix: str, table: Mapping[str, str]) -> Dict[str, str]:
    """A table of a backbone alone for a checkpoint that keeps the backbone below ``prefix``."""
    return {prefix + theirs: 'backbone.' + ours for theirs, ours in table.items()}


def _pattern(template: str) -> str:
    def group(match: 're.Match') -> str:
        return f'(?P<{match[1]}>{FIELDS.get(match[1], "[0-9]+")})'

    return re.sub(r'\\{(\w+)\\}', group, re.escape(template))
