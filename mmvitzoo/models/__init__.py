"""Backbones and necks, registered in MMEngine's root ``MODELS``."""

from .backbones import MPViT

__all__ = ['MPViT']
