"""MMDetection heads as Detectron2 and ViTDet have them; a config imports this module where it uses them."""

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
        *args: See :class:`mmdet.models.RPNHead`.
        norm_cfg: Such as ``dict(type='LayerNorm2d', eps=1e-6)``. None is ``RPNHead`` itself, which
            the detectors of Detectron2's ViTDet have.
        **kwargs: See :class:`mmdet.models.RPNHead`.
    """

    def __init__(self, *args: Any, norm_cfg: Optional[dict] = None, **kwargs: Any):
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


@MODELS.register_module()
class Detectron2CascadeRoIHead(CascadeRoIHead):
    """MMDetection's ``CascadeRoIHead``, with what published cascades of Detectron2 do otherwise.

    Cascade R-CNN: https://arxiv.org/abs/1712.00726; ours follows https://github.com/facebookresearch/detectron2.
    Scores are the mean of the stages' probabilities, not of their logits. There is one mask head,
    not one for each stage: it learns from the regions of the first stage, with its whole loss
    whatever the weight of the stage, and sees the final boxes.

    Args:
        *args: See :class:`mmdet.models.CascadeRoIHead`; box heads have softmax scores.
        **kwargs: See there.
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
        """Of the first stage; nothing of later ones.

        Args:
            stage: From 0 on.
            x: Levels of the neck, (B, C, H_i, W_i).
            sampling_results: Regions to learn from, by image.
            batch_gt_instances: What was annotated, by image.

        Returns:
            ``loss_mask``, which holds the losses by name.
        """
        if stage > 0:
            return dict(loss_mask={})
        predicted = self._mask_forward(x, bbox2roi([result.pos_priors for result in sampling_results]))['mask_preds']
        losses = self.mask_head.loss_and_target(predicted, sampling_results, batch_gt_instances, self.train_cfg[0])
        # The caller multiplies with the weight of the stage.
        return dict(loss_mask={name: x / self.stage_loss_weights[0] for name, x in losses['loss_mask'].items()})

    def _bbox_forward(self, stage: int, x: Tuple[Tensor], rois: Tensor, probabilities: bool = False) -> dict:
        results = super()._bbox_forward(stage, x, rois)
        if probabilities:
            results['cls_score'] = results['cls_score'].softmax(-1)
        return results

    def _refine_roi(self, *args, **kwargs) -> tuple:
        rois, probabilities, boxes = super()._refine_roi(*args, probabilities=True, **kwargs)
        # The box head takes the softmax, which undoes the logarithm.
        return rois, [x.log() for x in probabilities], boxes

    def forward(
        self, x: Tuple[Tensor, ...], rpn_results_list: List[InstanceData], batch_data_samples: List[DetDataSample]
    ) -> tuple:
        """What the heads return, before any selection.

        Args:
            x: Levels of the neck, (B, C, H_i, W_i).
            rpn_results_list: Proposals by image, whose ``bboxes`` are (N, 4) in pixels.
            batch_data_samples: Images, whose ``metainfo`` alone is read.

        Returns:
            By image: logarithms of probabilities, (N, classes + 1); deltas of the boxes, (N, 4) or
            (N, 4 * classes); if there is a mask head, logits of the masks, (N, classes, h, w).
        """
        proposals = [results.bboxes for results in rpn_results_list]
        counts = tuple(len(boxes) for boxes in proposals)
        metas = [sample.metainfo for sample in batch_data_samples]
        rois, *results = self._refine_roi(x, bbox2roi(proposals), metas, counts)
        if self.with_mask:
            results.append(self._mask_forward(x, bbox2roi([y[:, 1:] for y in rois]))['mask_preds'].split(counts))
        return tuple(results)
