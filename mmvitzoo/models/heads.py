"""MMDetection heads that follow Detectron2 and ViTDet.

They require MMDetection. Configs that use them add ``'mmvitzoo.models.heads'`` to their ``custom_imports``.
"""

from typing import Any, Dict, List, Optional, Tuple

from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.task_modules import SamplingResult
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn


@MODELS.register_module()
class NormRPNHead(RPNHead):
    """MMDetection's ``RPNHead`` (https://arxiv.org/abs/1506.01497) with a norm after each hidden convolution.

    Args:
        *args: Arguments of :class:`mmdet.models.RPNHead`.
        norm_cfg: Norm config, such as ``dict(type='LayerNorm2d', eps=1e-6)``. None: no norm, as in ``RPNHead`` and in
            Detectron2's ViTDet.
        **kwargs: Keyword arguments of :class:`mmdet.models.RPNHead`.
    """

    def __init__(self, *args: Any, norm_cfg: Optional[dict] = None, **kwargs: Any):
        self.norm_cfg = norm_cfg  # set first, since the constructor of RPNHead builds the layers
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


@MODELS.register_module()
class Detectron2CascadeRoIHead(CascadeRoIHead):
    """MMDetection's ``CascadeRoIHead`` (https://arxiv.org/abs/1712.00726) with the behavior of Detectron2.

    It differs from MMDetection in two points, following https://github.com/facebookresearch/detectron2. Scores are the
    mean of the stages' probabilities instead of their logits. There is one mask head instead of one for each stage. It
    trains on the proposals of the first stage and predicts masks for the final boxes. Its loss is not scaled by the
    weight of the stage.

    Args:
        *args: Arguments of :class:`mmdet.models.CascadeRoIHead`; the box heads must have softmax scores.
        **kwargs: Keyword arguments of :class:`mmdet.models.CascadeRoIHead`.
    """

    init_mask_head = StandardRoIHead.init_mask_head
    _mask_forward = StandardRoIHead._mask_forward
    predict_mask = StandardRoIHead.predict_mask

    def mask_loss(
        self,
        stage: int,
        x: Tuple[Tensor, ...],
        sampling_results: List[SamplingResult],
        batch_gt_instances: List[InstanceData],
    ) -> Dict[str, Dict[str, Tensor]]:
        """Computes the mask loss in the first stage; later stages have none.

        Args:
            stage: Index of the stage.
            x: Feature maps of the neck, (B, C, H_i, W_i).
            sampling_results: Sampled proposals of each image.
            batch_gt_instances: Ground truth of each image.

        Returns:
            Dictionary with ``loss_mask``, a dictionary of losses by name.
        """
        if stage > 0:
            return dict(loss_mask={})
        predicted = self._mask_forward(x, bbox2roi([result.pos_priors for result in sampling_results]))['mask_preds']
        losses = self.mask_head.loss_and_target(predicted, sampling_results, batch_gt_instances, self.train_cfg[0])
        # The caller multiplies the losses by the weight of the stage.
        return dict(loss_mask={name: x / self.stage_loss_weights[0] for name, x in losses['loss_mask'].items()})

    def _bbox_forward(self, stage: int, x: Tuple[Tensor], rois: Tensor, probabilities: bool = False) -> dict:
        results = super()._bbox_forward(stage, x, rois)
        if probabilities:
            results['cls_score'] = results['cls_score'].softmax(-1)
        return results

    def _refine_roi(self, *args, **kwargs) -> tuple:
        rois, probabilities, boxes = super()._refine_roi(*args, probabilities=True, **kwargs)
        # The box head applies a softmax, which restores these probabilities.
        return rois, [x.log() for x in probabilities], boxes

    def forward(
        self, x: Tuple[Tensor, ...], rpn_results_list: List[InstanceData], batch_data_samples: List[DetDataSample]
    ) -> tuple:
        """Computes the raw outputs of the heads, without score threshold or NMS.

        Args:
            x: Feature maps of the neck, (B, C, H_i, W_i).
            rpn_results_list: Proposals of each image, with ``bboxes`` (N, 4) in pixels.
            batch_data_samples: Data samples of the images; only ``metainfo`` is read.

        Returns:
            Lists with one tensor for each image: log-probabilities, (N, classes + 1); box deltas, (N, 4) or
            (N, 4 * classes); with a mask head, mask logits, (N, classes, h, w).
        """
        proposals = [results.bboxes for results in rpn_results_list]
        counts = tuple(len(boxes) for boxes in proposals)
        metas = [sample.metainfo for sample in batch_data_samples]
        rois, *results = self._refine_roi(x, bbox2roi(proposals), metas, counts)
        if self.with_mask:
            boxes = [image_rois[:, 1:] for image_rois in rois]
            results.append(self._mask_forward(x, bbox2roi(boxes))['mask_preds'].split(counts))
        return tuple(results)
