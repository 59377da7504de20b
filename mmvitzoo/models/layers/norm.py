"""LayerNorm over the channels of a (B, C, H, W) map, for ``norm_cfg`` of necks and heads.

OpenMMLab's ``'LN'`` normalizes the last axis, which suits tokens but not maps. With
``norm_cfg=dict(type='LayerNorm2d', eps=1e-6)`` stock convolutional heads normalize each pixel over its channels, as
ViTDet's heads do. mmcv sets eps to 1e-5 where a config gives none.
"""

from mmengine.registry import MODELS
from timm.layers import LayerNorm2d

MODELS.register_module(module=LayerNorm2d)

__all__ = ['LayerNorm2d']
