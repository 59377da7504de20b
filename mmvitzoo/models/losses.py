"""Losses that no OpenMMLab package has."""

import json
from typing import Dict, Optional

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class FederatedLoss(nn.Module):
    """Sigmoid cross entropy over a sample of the classes, for federated annotations such as LVIS's.

    An image of LVIS is annotated for some classes only, so that most negatives are unknown. A step
    counts the classes that it contains and, up to ``num_sampled`` in all, others drawn with a
    probability that grows with the number of images that have them (Zhou et al., 2021,
    https://arxiv.org/abs/2103.07461; ViTDet uses it for LVIS). For MMDetection's box heads.

    Args:
        num_classes: Foreground classes. Scores have one more column, which counts for nothing, as
            Detectron2's have.
        ann_file: Annotations in LVIS's format, whose ``categories`` have an ``image_count``; read
            when the first loss is computed.
        num_sampled: Classes that count in a step.
        power: Of the image count, in the probability.
        loss_weight: Factor of the loss.

    Raises:
        ValueError: The annotations do not have ``num_classes`` categories with an ``image_count``.
    """

    # What MMDetection's box heads ask of a loss that is not a softmax.
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
        """Columns of the scores: one more than there are classes."""
        return num_classes + 1

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """(N, classes + 1) -> probabilities of the same shape."""
        return cls_score.sigmoid()

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> Dict[str, Tensor]:
        """Percentage of the foreground whose class scores best.

        Args:
            cls_score: (N, classes + 1).
            labels: (N,); ``num_classes`` is background.

        Returns:
            ``acc_classes``, a number of 0 to 100.
        """
        foreground = labels < self.num_classes
        right = cls_score[foreground, :-1].argmax(1) == labels[foreground]
        return dict(acc_classes=100 * right.float().sum() / foreground.sum().clamp(min=1))

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[float] = None,
        reduction_override: Optional[str] = None,
    ) -> Tensor:
        """Sum over the sampled classes, mean over the boxes.

        Args:
            cls_score: (N, classes + 1).
            label: (N,); ``num_classes`` is background.
            weight: (N,), of the boxes.
            avg_factor: Divisor of the sum; default N.
            reduction_override: None or ``'mean'``; box heads pass nothing else.

        Returns:
            One number.

        Raises:
            ValueError: Another reduction, or annotations that the class does not take.
        """
        if reduction_override not in (None, 'mean'):
            raise ValueError(f"FederatedLoss: reduction is 'mean', got {reduction_override!r}")
        target = F.one_hot(label, self.num_classes + 1)[:, :-1].to(cls_score.dtype)
        loss = F.binary_cross_entropy_with_logits(cls_score[:, :-1], target, reduction='none')
        loss = loss[:, self._sample(label)].sum(1)
        if weight is not None:
            loss = loss * weight
        return self.loss_weight * loss.sum() / (avg_factor or max(len(loss), 1))

    def _sample(self, label: Tensor) -> Tensor:
        """The classes that count: all that are present, and others by their frequency."""
        present = label.unique()
        present = present[present < self.num_classes]
        missing = min(self.num_sampled, self.num_classes) - len(present)
        if missing <= 0:
            return present
        if self._frequency is None:
            self._frequency = self._read_frequency()
        chances = self._frequency.to(label.device).clone()
        chances[present] = 0
        return torch.cat([present, chances.multinomial(missing)])

    def _read_frequency(self) -> Tensor:
        print_log(f'FederatedLoss: reading class frequencies from {self.ann_file}', logger='current')
        with open(self.ann_file) as file:
            categories = json.load(file).get('categories', [])
        counts = [category.get('image_count') for category in sorted(categories, key=lambda x: x['id'])]
        if len(counts) != self.num_classes or None in counts:
            raise ValueError(
                f'FederatedLoss: {self.ann_file} lists {len(counts)} categories, wanted are {self.num_classes} '
                'with an image_count'
            )
        # Classes of no image can be drawn, too, when no others are left.
        return torch.tensor(counts, dtype=torch.float).clamp(min=1e-3) ** self.power
