"""Backbones and necks, registered in MMEngine's root ``MODELS``."""

from .backbones import MPViT, PlainViT, ViTAE
from .necks import SimpleFeaturePyramid

__all__ = ['MPViT', 'PlainViT', 'SimpleFeaturePyramid', 'ViTAE']
