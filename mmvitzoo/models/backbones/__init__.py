"""One file per family."""

from .mpvit import MPViT
from .mvitv2 import MViTv2
from .scalablevit import ScalableViT
from .vit import PlainViT
from .vitae import ViTAE

__all__ = ['MPViT', 'MViTv2', 'PlainViT', 'ScalableViT', 'ViTAE']
