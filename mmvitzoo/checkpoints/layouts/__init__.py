"""Tables of key names, one file per family; PlainViT has ``vit.py``, ``dino.py``, ``clip.py`` and ``rope.py``."""

from . import clip, dino, mpvit, mvitv2, rope, scalablevit, vit, vitae
from .layout import Dropped, Layout, Unsupported, backbone_under, part_under, unchanged

# The first layout whose signature fits a file is its layout. Blocks of ViTAE have all weights of PlainViT's, and more.
LAYOUTS = [
    *mpvit.LAYOUTS,
    *mvitv2.LAYOUTS,
    *scalablevit.LAYOUTS,
    *vitae.LAYOUTS,
    *rope.LAYOUTS,
    *dino.LAYOUTS,
    *clip.LAYOUTS,
    *vit.LAYOUTS,
]

__all__ = ['LAYOUTS', 'Dropped', 'Layout', 'Unsupported', 'backbone_under', 'part_under', 'unchanged']
