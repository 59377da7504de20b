"""Data preprocessor of MMDetection for images of any number of channels.

It requires MMDetection. Configs that use it add ``'mmvitzoo.models.data_preprocessors'`` to their ``custom_imports``.
"""

from typing import Any, Dict, Sequence

import torch
from mmdet.models import DetDataPreprocessor
from mmengine.registry import MODELS


@MODELS.register_module()
class MultiChannelDetDataPreprocessor(DetDataPreprocessor):
    """MMDetection's ``DetDataPreprocessor`` for images of any number of channels.

    The base class takes means of 1 or 3 channels. Here the channels keep the order of the loader.

    Args:
        mean: Mean of each channel, in units of the loader.
        std: Standard deviation of each channel, in units of the loader.
        **kwargs: Keyword arguments of :class:`mmdet.models.DetDataPreprocessor`, without a swap of channels.

    Raises:
        ValueError: ``mean`` and ``std`` differ in length, or a swap of channels is asked for.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs: Any):
        name = type(self).__name__
        if kwargs.pop('bgr_to_rgb', False) or kwargs.pop('rgb_to_bgr', False):
            raise ValueError(
                f'{name}: bgr_to_rgb and rgb_to_bgr are not supported; channels have the order of the loader'
            )
        if len(mean) != len(std):
            raise ValueError(
                f'{name}: mean and std have a value for each channel, got {len(mean)} and {len(std)} values'
            )
        super().__init__(**kwargs)
        # As the base class would do for 1 or 3 channels.
        self._enable_normalize = True
        self.register_buffer('mean', torch.tensor(mean, dtype=torch.float).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std, dtype=torch.float).view(-1, 1, 1), persistent=False)

    def forward(self, data: Dict[str, Any], training: bool = False) -> Dict[str, Any]:
        """Normalizes and pads a batch, as the base class does.

        Args:
            data: ``inputs``, images of (C, H, W), and ``data_samples``.
            training: Apply the augmentations of batches.

        Raises:
            ValueError: An image has another number of channels than ``mean``.
        """
        for image in data['inputs']:
            if len(image) != len(self.mean):
                raise ValueError(
                    f'{type(self).__name__}: mean and std have {len(self.mean)} values, '
                    f'got an image of {len(image)} channels'
                )
        return super().forward(data, training)
