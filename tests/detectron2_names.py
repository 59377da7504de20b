"""Random weights with the names and shapes of Detectron2's detectors."""

import torch

BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def heads(stages=('',), norm=(), box_convs=4, rpn_convs=2, hidden=1024):
    """Returns the heads of a Mask R-CNN, or of a Cascade Mask R-CNN with ``stages=('.0', '.1', '.2')``.

    Args:
        stages: Suffixes of the stages' names.
        norm: Weights and buffers of the norm after a convolution; without a norm the convolution has a bias.
        box_convs: Convolutions in a box head.
        rpn_convs: Convolutions in the RPN.
        hidden: Width of the linear layers in box heads.
    """
    weights = {'pixel_mean': torch.zeros(3, 1, 1), 'pixel_std': torch.zeros(3, 1, 1)}
    shapes = {}
    rpn = 'proposal_generator.rpn_head'
    for i in range(rpn_convs):
        shapes[f'{rpn}.conv.conv{i}' if rpn_convs > 1 else f'{rpn}.conv'] = (256, 256, 3, 3)
    shapes.update({f'{rpn}.objectness_logits': (3, 256, 1, 1), f'{rpn}.anchor_deltas': (12, 256, 1, 1)})
    for i in range(5):
        weights[f'proposal_generator.anchor_generator.cell_anchors.{i}'] = torch.zeros(3, 4)
    for stage in stages:
        for i in range(1, box_convs + 1):
            shapes[f'roi_heads.box_head{stage}.conv{i}'] = (256, 256, 3, 3)
        shapes[f'roi_heads.box_head{stage}.fc1'] = (hidden, 256 * 49)
        if not box_convs:
            shapes[f'roi_heads.box_head{stage}.fc2'] = (hidden, hidden)
        shapes[f'roi_heads.box_predictor{stage}.cls_score'] = (81, hidden)
        shapes[f'roi_heads.box_predictor{stage}.bbox_pred'] = (4 if stage else 320, hidden)
    for i in range(1, 5):
        shapes[f'roi_heads.mask_head.mask_fcn{i}'] = (256, 256, 3, 3)
    shapes['roi_heads.mask_head.deconv'] = (256, 256, 2, 2)
    shapes['roi_heads.mask_head.predictor'] = (80, 256, 1, 1)
    for key, shape in shapes.items():
        weights[f'{key}.weight'] = torch.randn(shape)
        if norm and ('.conv' in key and 'box_head' in key or 'mask_fcn' in key):
            weights.update({f'{key}.norm.{name}': torch.randn(() if 'num' in name else shape[:1]) for name in norm})
        else:
            weights[f'{key}.bias'] = torch.randn(shape[0])
    return weights


def retinanet(widths):
    """Returns a RetinaNet without its backbone, whose maps of strides 8 to 32 have these widths."""
    weights = {**fpn(widths, first=3), 'pixel_mean': torch.zeros(3, 1, 1), 'pixel_std': torch.zeros(3, 1, 1)}
    shapes = {'head.cls_score': (9 * 80, 256, 3, 3), 'head.bbox_pred': (9 * 4, 256, 3, 3)}
    shapes.update({'backbone.top_block.p6': (256, widths[-1], 3, 3), 'backbone.top_block.p7': (256, 256, 3, 3)})
    for i in (0, 2, 4, 6):  # with a ReLU after each
        shapes.update({f'head.{name}_subnet.{i}': (256, 256, 3, 3) for name in ('cls', 'bbox')})
    for key, shape in shapes.items():
        weights.update({f'{key}.weight': torch.randn(shape), f'{key}.bias': torch.randn(shape[0])})
    for i in range(5):
        weights[f'anchor_generator.cell_anchors.{i}'] = torch.zeros(9, 4)
    return weights


def fpn(widths, first=2):
    """Returns a feature pyramid for maps of these widths, the first of stride ``2**first``."""
    weights = {}
    for level, width in enumerate(widths, first):
        for name, shape in (('lateral', (256, width, 1, 1)), ('output', (256, 256, 3, 3))):
            weights[f'backbone.fpn_{name}{level}.weight'] = torch.randn(shape)
            weights[f'backbone.fpn_{name}{level}.bias'] = torch.randn(256)
    return weights
