"""Backbones, necks and losses, registered in MMEngine's root ``MODELS``."""

from .backbones import MPViT, MViTv2, PlainViT, ScalableViT, TimmBackbone, ViTAE
from .losses import FederatedLoss
from .necks import SimpleFeaturePyramid

__all__ = [
    'FederatedLoss',
    'MPViT',
    'MViTv2',
    'PlainViT',
    'ScalableViT',
    'SimpleFeaturePyramid',
    'TimmBackbone',
    'ViTAE',
]
