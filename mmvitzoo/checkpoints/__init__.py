"""Reads checkpoint files safely, recognizes their layout and renames their keys."""

from .conversion import ConversionResult, convert, export
from .loading import extend_mmengine, match_names
from .pretrained import load_pretrained
from .reading import CheckpointError, load
from .safe_pickle import trust_mmengine_checkpoints
from .saving import save

__all__ = [
    'CheckpointError',
    'ConversionResult',
    'convert',
    'export',
    'extend_mmengine',
    'load',
    'load_pretrained',
    'match_names',
    'save',
    'trust_mmengine_checkpoints',
]
