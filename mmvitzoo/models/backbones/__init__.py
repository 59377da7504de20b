"""Backbones, one file per family."""

from . import mpvit, mvitv2, scalablevit, vit
from .mpvit import MPViT
from .mvitv2 import MViTv2
from .scalablevit import ScalableViT
from .timm_backbone import TimmBackbone
from .vit import PlainViT
from .vitae import ViTAE

# Transformer blocks of all families; ViTAE's is a subclass of ViT's.
BLOCKS = (vit.Block, mpvit.PathBlock, mvitv2.PoolingBlock, scalablevit.Block)

__all__ = ['BLOCKS', 'MPViT', 'MViTv2', 'PlainViT', 'ScalableViT', 'TimmBackbone', 'ViTAE']
