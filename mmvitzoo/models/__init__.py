"""Backbones, necks and losses, registered in MMEngine's root ``MODELS``."""

from .backbones import MPViT, PlainViT, ViTAE
from .losses import FederatedLoss
from .necks import SimpleFeaturePyramid

__all__ = ['FederatedLoss', 'MPViT', 'PlainViT', 'SimpleFeaturePyramid', 'ViTAE']
