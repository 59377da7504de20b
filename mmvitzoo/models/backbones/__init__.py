"""One file per family."""

from .mpvit import MPViT
from .vit import PlainViT
from .vitae import ViTAE

__all__ = ['MPViT', 'PlainViT', 'ViTAE']
