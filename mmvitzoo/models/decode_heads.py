"""MMSegmentation heads that stock MMSegmentation lacks.

They require MMSegmentation. Configs that use them add ``'mmvitzoo.models.decode_heads'`` to their ``custom_imports``.
"""

from typing import Any, Sequence

from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor


@MODELS.register_module()
class BNHead(BaseDecodeHead):
    """Linear head of DINOv2 (https://arxiv.org/abs/2304.07193): a BatchNorm and a 1 x 1 convolution.

    Parameters have the authors' names, so that their published heads load. With ``input_transform='resize_concat'``,
    as in their configs, maps are resized bilinearly to the first one and concatenated.

    Args:
        *args: Arguments of MMSegmentation's ``BaseDecodeHead``; ``channels`` is the sum of the channels of the inputs.
        norm_cfg: Norm config.
        dropout_ratio: Dropout rate of whole channels before the convolution.
        **kwargs: Keyword arguments of MMSegmentation's ``BaseDecodeHead``.

    Raises:
        ValueError: ``channels`` is another number.
    """

    def __init__(self, *args: Any, norm_cfg: dict = dict(type='SyncBN'), dropout_ratio: float = 0, **kwargs: Any):
        super().__init__(*args, norm_cfg=norm_cfg, dropout_ratio=dropout_ratio, **kwargs)
        if self.channels != self.in_channels:
            raise ValueError(
                f'BNHead: channels is the sum of in_channels, {self.in_channels} with input_transform='
                f'{self.input_transform!r}, got {self.channels}'
            )
        self.bn = build_norm_layer(norm_cfg, self.channels)[1]

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Computes the logits of each class.

        Args:
            inputs: Feature maps, (B, C_i, H_i, W_i).

        Returns:
            Logits, (B, ``num_classes``, H, W) with the size of the first selected map.
        """
        return self.cls_seg(self.bn(self._transform_inputs(inputs)))
