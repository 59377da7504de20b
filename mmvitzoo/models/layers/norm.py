"""LayerNorm over the channels of a (B, C, H, W) map, for ``norm_cfg`` of necks and heads.

OpenMMLab's ``'LN'`` is for tokens and normalises a map's last axis. With
``norm_cfg=dict(type='LayerNorm2d', eps=1e-6)`` stock convolutional heads normalise each pixel over
its channels, as ViTDet's do. (mmcv sets eps to 1e-5 where a config gives none.)
"""

from mmengine.registry import MODELS
from timm.layers import LayerNorm2d

MODELS.register_module(module=LayerNorm2d)

__all__ = ['LayerNorm2d']
