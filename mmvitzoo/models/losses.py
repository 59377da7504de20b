"""Losses that the OpenMMLab toolboxes do not provide."""

import json
from typing import Dict, Optional

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class FederatedLoss(nn.Module):
    """Sigmoid cross entropy over sampled classes, for federated annotations such as those of LVIS.

    An image of LVIS is annotated for a subset of the classes only, so most negatives are unknown. Each step computes
    the loss for the classes in its targets and for randomly sampled classes, ``num_sampled`` in total. The sampling
    probability is proportional to ``image_count ** power``. The loss was published by Zhou et al., 2021
    (https://arxiv.org/abs/2103.07461); ViTDet uses it for LVIS. Use it as ``loss_cls`` of MMDetection's box heads.

    Args:
        num_classes: Number of foreground classes. Scores have one more column for the background, which does not
            contribute, as in Detectron2.
        ann_file: Path of annotations in LVIS format, whose ``categories`` have an ``image_count``. The file is read
            when the first loss is computed.
        num_sampled: Number of classes in the loss of a step.
        power: Exponent of the image count in the sampling probability.
        loss_weight: Weight of the loss.

    Raises:
        ValueError: The annotations do not have ``num_classes`` categories with an ``image_count``.
    """

    # With these attributes, MMDetection's box heads call the get_* methods below instead of assuming a softmax.
    custom_cls_channels = custom_activation = custom_accuracy = True

    def __init__(
        self,
        num_classes: int,
        ann_file: str,
        num_sampled: int = 50,
        power: float = 0.5,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.ann_file = ann_file
        self.num_sampled = num_sampled
        self.power = power
        self.loss_weight = loss_weight
        self._frequency: Optional[Tensor] = None

    def get_cls_channels(self, num_classes: int) -> int:
        """Returns the number of score columns: the classes and the background."""
        return num_classes + 1

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Converts scores to probabilities: (N, classes + 1) -> (N, classes + 1)."""
        return cls_score.sigmoid()

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> Dict[str, Tensor]:
        """Computes the top-1 accuracy of the foreground boxes.

        Args:
            cls_score: Scores, (N, classes + 1).
            labels: Class indices, (N,); ``num_classes`` is background.

        Returns:
            Dictionary with ``acc_classes`` in percent.
        """
        foreground = labels < self.num_classes
        correct = cls_score[foreground, :-1].argmax(1) == labels[foreground]
        return dict(acc_classes=100 * correct.float().sum() / foreground.sum().clamp(min=1))

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[float] = None,
        reduction_override: Optional[str] = None,
    ) -> Tensor:
        """Computes the loss, summed over the sampled classes and averaged over the boxes.

        Args:
            cls_score: Scores, (N, classes + 1).
            label: Class indices, (N,); ``num_classes`` is background.
            weight: Weights of the boxes, (N,). None: 1.
            avg_factor: Divisor of the sum over the boxes. None: N.
            reduction_override: Reduction, None or ``'mean'``.

        Returns:
            Loss, a scalar.

        Raises:
            ValueError: The reduction is not supported, or the annotations do not fit.
        """
        if reduction_override not in (None, 'mean'):
            raise ValueError(f"FederatedLoss: reduction_override must be None or 'mean', got {reduction_override!r}")
        target = F.one_hot(label, self.num_classes + 1)[:, :-1].to(cls_score.dtype)
        loss = F.binary_cross_entropy_with_logits(cls_score[:, :-1], target, reduction='none')
        loss = loss[:, self._sample(label)].sum(1)
        if weight is not None:
            loss = loss * weight
        return self.loss_weight * loss.sum() / (avg_factor or max(len(loss), 1))

    def _sample(self, label: Tensor) -> Tensor:
        """Returns the indices of the present classes and of classes sampled by frequency."""
        present = label.unique()
        present = present[present < self.num_classes]
        num_others = min(self.num_sampled, self.num_classes) - len(present)
        if num_others <= 0:
            return present
        if self._frequency is None:
            self._frequency = self._read_frequency()
        probabilities = self._frequency.to(label.device).clone()
        probabilities[present] = 0
        return torch.cat([present, probabilities.multinomial(num_others)])

    def _read_frequency(self) -> Tensor:
        print_log(f'FederatedLoss: reading class frequencies from {self.ann_file}', logger='current')
        with open(self.ann_file) as file:
            categories = json.load(file).get('categories', [])
        counts = [category.get('image_count') for category in sorted(categories, key=lambda x: x['id'])]
        if len(counts) != self.num_classes or None in counts:
            raise ValueError(
                f'FederatedLoss: {self.ann_file} must have {self.num_classes} categories with an image_count, '
                f'got {len(counts)} categories, {len(counts) - counts.count(None)} with an image_count'
            )
        # The minimum allows classes without images to be sampled when no others are left.
        return torch.tensor(counts, dtype=torch.float).clamp(min=1e-3) ** self.power
