"""Reads checkpoint files safely, recognizes their layout and renames their keys."""

from .conversion import ConversionResult, convert, export
from .pretrained import load_pretrained
from .reading import CheckpointError, load
from .safe_pickle import trust_mmengine_checkpoints
from .saving import save

__all__ = [
    'CheckpointError',
    'ConversionResult',
    'convert',
    'export',
    'load',
    'load_pretrained',
    'save',
    'trust_mmengine_checkpoints',
]
