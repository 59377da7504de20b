"""MMDetection heads as ViTDet needs them; a config imports this module where it uses them."""

from typing import Optional

from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import RPNHead
from mmengine.registry import MODELS
from torch import nn


@MODELS.register_module()
class NormRPNHead(RPNHead):
    """MMDetection's ``RPNHead`` with a norm after each of its hidden convolutions.

    Args:
        *args: See :class:`mmdet.models.RPNHead`.
        norm_cfg: Such as ``dict(type='LayerNorm2d', eps=1e-6)``. None is ``RPNHead`` itself, which
            the detectors of Detectron2's ViTDet have.
        **kwargs: See :class:`mmdet.models.RPNHead`.
    """

    def __init__(self, *args, norm_cfg: Optional[dict] = None, **kwargs):
        self.norm_cfg = norm_cfg  # the constructor of RPNHead builds the layers
        super().__init__(*args, **kwargs)

    def _init_layers(self) -> None:
        super()._init_layers()
        if self.norm_cfg is not None:
            channels = [self.in_channels] + [self.feat_channels] * self.num_convs
            self.rpn_conv = nn.Sequential(
                *(
                    ConvModule(dim, out_dim, 3, padding=1, norm_cfg=self.norm_cfg, inplace=False)
                    for dim, out_dim in zip(channels, channels[1:])
                )
            )
