"""Simple feature pyramid of ViTDet (https://arxiv.org/abs/2203.16527)."""

from typing import Optional, Sequence, Tuple, Union

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import LayerNorm2d


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Feature pyramid built from the last feature map of a plain backbone.

    Each level rescales the map by transposed convolutions or max pooling. A 1 x 1 and a 3 x 3 convolution follow, each
    with a norm and without activation. There is no top-down path. Levels double or halve the sides of the input map, so
    they have the sizes that heads expect of a stride for images that 32 divides (``pad_size_divisor=32``).

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of each level.
        scale_factors: Scale factors of the levels relative to the input map: a descending subset of 4, 2, 1 and 0.5.
            For a map of stride 16, the default gives strides 4, 8, 16 and 32.
        num_outs: Number of levels. Levels beyond ``scale_factors`` subsample the previous level by 2.
        halve_channels: Halve the channels in each transposed convolution, as in Detectron2. False keeps them, as in the
            ViTDet repository of the ViTAE authors.
        norm_cfg: Norm config of the 1 x 1 and 3 x 3 convolutions. None: no norm.
        init_cfg: Initialization config of MMEngine.

    Raises:
        ValueError: An argument is not allowed; the message gives the allowed values.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import SimpleFeaturePyramid
        >>> neck = SimpleFeaturePyramid(64, 32)
        >>> [tuple(x.shape) for x in neck((torch.rand(1, 64, 8, 12),))]
        [(1, 32, 32, 48), (1, 32, 16, 24), (1, 32, 8, 12), (1, 32, 4, 6), (1, 32, 2, 3)]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int = 5,
        halve_channels: bool = True,
        norm_cfg: Optional[dict] = dict(type='LayerNorm2d', eps=1e-6),
        init_cfg: Optional[Union[dict, list]] = None,
    ):
        super().__init__(init_cfg)
        for name, value in (('in_channels', in_channels), ('out_channels', out_channels), ('num_outs', num_outs)):
            if not isinstance(value, int):
                hint = ': it reads the last map alone' if name == 'in_channels' else ''
                raise ValueError(f'SimpleFeaturePyramid: {name} is a number{hint}, got {value!r}')
        if norm_cfg is not None and not (isinstance(norm_cfg, dict) and 'type' in norm_cfg):
            raise ValueError(
                f"SimpleFeaturePyramid: norm_cfg is a dict such as dict(type='BN'), or None, got {norm_cfg!r}"
            )
        factors = list(scale_factors)
        if not factors or factors != sorted(set(factors) & {4, 2, 1, 0.5}, reverse=True):
            raise ValueError(
                'SimpleFeaturePyramid: scale_factors must be a descending subset of (4, 2, 1, 0.5), '
                f'got {scale_factors!r}'
            )
        if num_outs < len(factors):
            raise ValueError(f'SimpleFeaturePyramid: num_outs must be at least {len(factors)}, got {num_outs!r}')
        self.num_outs = num_outs
        self.rescale = nn.ModuleList()
        self.lateral_convs = nn.ModuleList()
        self.fpn_convs = nn.ModuleList()
        conv_cfg = dict(norm_cfg=norm_cfg, act_cfg=None)
        half, quarter = (in_channels // 2, in_channels // 4) if halve_channels else (in_channels, in_channels)
        for factor in factors:
            channels = {4: quarter, 2: half}.get(factor, in_channels)
            if factor == 4:
                layers = [
                    nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                    LayerNorm2d(half, eps=1e-6),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ]
            elif factor == 2:
                layers = [nn.ConvTranspose2d(in_channels, half, 2, stride=2)]
            else:
                layers = [] if factor == 1 else [nn.MaxPool2d(2)]
            self.rescale.append(nn.Sequential(*layers))
            self.lateral_convs.append(ConvModule(channels, out_channels, 1, **conv_cfg))
            self.fpn_convs.append(ConvModule(out_channels, out_channels, 3, padding=1, **conv_cfg))

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Builds the pyramid from the last of the feature maps.

        Args:
            inputs: Feature maps of a backbone; the last one is (B, ``in_channels``, H, W).

        Returns:
            ``num_outs`` contiguous feature maps, (B, ``out_channels``, H_i, W_i).
        """
        outs = []
        for rescale, lateral, conv in zip(self.rescale, self.lateral_convs, self.fpn_convs):
            # Operators of mmcv such as RoIAlign read the memory of a feature map as if it were contiguous.
            outs.append(conv(lateral(rescale(inputs[-1]))).contiguous())
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)
