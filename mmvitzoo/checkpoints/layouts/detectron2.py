"""Detectron2's names of the parts of a detector around its backbone."""

from typing import Any, Dict

from torch import Tensor

from .layout import Dropped

_IN_CONFIG = {
    'anchor_generator.{rest}': Dropped('anchors follow from the config'),
    'pixel_mean': Dropped('is in the data preprocessor of the config'),
    'pixel_std': Dropped('is in the data preprocessor of the config'),
}


def fpn(first: int) -> Dict[str, str]:
    """Returns the table of a feature pyramid whose first level has stride ``2**first``."""
    return {
        f'backbone.fpn_{theirs}{level}.{{leaf}}': f'neck.{ours}.{level - first}.conv.{{leaf}}'
        for theirs, ours in (('lateral', 'lateral_convs'), ('output', 'fpn_convs'))
        for level in range(first, 6)
    }


RETINANET = {
    **fpn(3),
    'backbone.top_block.p6.{leaf}': 'neck.fpn_convs.3.conv.{leaf}',
    'backbone.top_block.p7.{leaf}': 'neck.fpn_convs.4.conv.{leaf}',
    **{
        f'head.{theirs}_subnet.{2 * i}.{{leaf}}': f'bbox_head.{ours}_convs.{i}.conv.{{leaf}}'
        for theirs, ours in (('cls', 'cls'), ('bbox', 'reg'))
        for i in range(4)
    },
    'head.cls_score.{leaf}': 'bbox_head.retina_cls.{leaf}',
    'head.bbox_pred.{leaf}': 'bbox_head.retina_reg.{leaf}',
    **_IN_CONFIG,
}


def heads(norm: str) -> Dict[str, Any]:
    """Returns the table of the heads of Mask R-CNN and Cascade Mask R-CNN.

    Args:
        norm: mmcv's name of the norm after the heads' convolutions, ``'ln'`` or ``'bn'``.
    """
    rpn, roi = 'proposal_generator.rpn_head', 'roi_heads'
    table: Dict[str, Any] = {
        f'{rpn}.conv.conv{{i}}.norm.{{leaf}}': f'rpn_head.rpn_conv.{{i}}.{norm}.{{leaf}}',
        f'{rpn}.conv.conv{{i}}.{{leaf}}': 'rpn_head.rpn_conv.{i}.conv.{leaf}',
        f'{rpn}.conv.{{leaf}}': 'rpn_head.rpn_conv.{leaf}',
        f'{rpn}.objectness_logits.{{leaf}}': 'rpn_head.rpn_cls.{leaf}',
        f'{rpn}.anchor_deltas.{{leaf}}': 'rpn_head.rpn_reg.{leaf}',
        f'{roi}.mask_head.deconv.{{leaf}}': 'roi_head.mask_head.upsample.{leaf}',
        f'{roi}.mask_head.predictor.{{leaf}}': 'roi_head.mask_head.conv_logits.{leaf}',
    }
    for stage in ('', '.{s}'):  # a single box head, or a cascade
        box = f'roi_head.bbox_head{stage}'
        for i in range(2):
            table[f'{roi}.box_head{stage}.fc{i + 1}.{{leaf}}'] = f'{box}.shared_fcs.{i}.{{leaf}}'
        table[f'{roi}.box_predictor{stage}.cls_score.{{leaf}}'] = f'{box}.fc_cls.{{leaf}}'
        table[f'{roi}.box_predictor{stage}.bbox_pred.{{leaf}}'] = f'{box}.fc_reg.{{leaf}}'
        table[f'{roi}.box_predictor{stage}.fed_loss_cls_weights'] = Dropped('is read from the annotations')
        for i in range(4):
            table[f'{roi}.box_head{stage}.conv{i + 1}.norm.{{leaf}}'] = f'{box}.shared_convs.{i}.{norm}.{{leaf}}'
            table[f'{roi}.box_head{stage}.conv{i + 1}.{{leaf}}'] = f'{box}.shared_convs.{i}.conv.{{leaf}}'
    for i in range(4):
        mask = f'roi_head.mask_head.convs.{i}'
        table[f'{roi}.mask_head.mask_fcn{i + 1}.norm.{{leaf}}'] = f'{mask}.{norm}.{{leaf}}'
        table[f'{roi}.mask_head.mask_fcn{i + 1}.{{leaf}}'] = f'{mask}.conv.{{leaf}}'
    table['proposal_generator.anchor_generator.{rest}'] = _IN_CONFIG['anchor_generator.{rest}']
    return {**table, **_IN_CONFIG}


def reorder_anchors(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Reorders the nine anchors of RetinaNet from sizes x ratios (Detectron2) to ratios x sizes (MMDetection)."""
    for key, value in state_dict.items():
        if key.startswith(('bbox_head.retina_cls.', 'bbox_head.retina_reg.')):
            num_channels = len(value) if value.dim() else 0
            if not num_channels or num_channels % 9:
                raise ValueError(f'{key} has shape {tuple(value.shape)}, expected 3 sizes x 3 ratios of channels')
            anchors = value.unflatten(0, (3, 3, num_channels // 9))
            state_dict[key] = anchors.transpose(0, 1).flatten(0, 2)


def restore_anchors(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Undoes :func:`reorder_anchors`, which is its own inverse for three sizes and three ratios."""
    restored = dict(state_dict)
    reorder_anchors(restored, {})
    return restored
