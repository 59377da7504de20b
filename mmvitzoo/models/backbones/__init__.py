"""One file per family."""

from .mpvit import MPViT

__all__ = ['MPViT']
