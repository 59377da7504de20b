"""Reading checkpoint files safely, recognising their layout, renaming their keys."""

from .conversion import Converted, convert, export
from .pretrained import load_pretrained
from .reading import CheckpointError, load
from .saving import save
from .trusted import trust_mmengine_checkpoints

__all__ = [
    'CheckpointError',
    'Converted',
    'convert',
    'export',
    'load',
    'load_pretrained',
    'save',
    'trust_mmengine_checkpoints',
]
