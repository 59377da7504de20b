# mmvitzoo.ops: torchvision's operators as mmcv._ext, version 1
# ruff: noqa: N803  argument names are mmcv's
"""Operators of torchvision behind the interface of mmcv's compiled module ``mmcv._ext``.

``python -m mmvitzoo.ops install`` copies this file to ``mmcv/_ext.py`` of an mmcv without compiled operators. The file
therefore imports nothing from this package. Functions have the names, arguments and results of mmcv's
``csrc/pytorch/pybind.cpp``. Most of them write into tensors that the caller allocated. The arguments ``columns``,
``ones`` and ``im2col_step`` are buffers and hints for the compiled kernels and are not used here. float16 and bfloat16
are computed in float32, as torchvision does under autocast.
"""

import logging
import multiprocessing
import os
from typing import Any, Callable, List, Tuple

import numpy as np
import torch
import torchvision
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # FLT_MIN; the focal losses clamp probabilities to it before the logarithm

if multiprocessing.parent_process() is None and os.environ.get('RANK', '0') == '0':  # once, not in data workers
    logging.getLogger('mmcv').warning('mmcv.ops: operators come from torchvision %s', torchvision.__version__)


def __getattr__(name: str) -> Callable:
    """Returns a function that raises an error with the operator's name; mmcv requires all names to exist at import."""
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f'{name} requires compiled mmcv; the installed operators are those of torchvision. See docs/operators.md '
            'of MMViTZoo for how to compile mmcv (in a checkout: make env OPS=compiled)'
        )

    return missing


def get_compiler_version() -> str:
    """Returns the compiler version for MMEngine's report; there is none, since nothing was compiled."""
    return 'n/a'


def get_compiling_cuda_version() -> str:
    """Returns the CUDA version of PyTorch for MMEngine's report."""
    return torch.version.cuda or 'not available'


def _to_float32(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """Casts float16 and bfloat16 to float32."""
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors)


# Boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Selects boxes (N, 4) by scores (N,); returns the kept indices, highest score first.

    mmcv compares in float32, torchvision in float64. Rounding the threshold to float32 makes both agree if an IoU
    equals the threshold.
    """
    boxes = boxes.float()
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores.float(), float(np.float32(iou_threshold)))


def _iou(boxes: np.ndarray, index: int, others: np.ndarray, offset: int = 0) -> np.ndarray:
    """Computes the IoU of the box at ``index`` with those at the M indices ``others``: boxes (N, 4) -> (M,)."""
    box, others = boxes[index], boxes[others]
    area, areas = ((x[..., 2:] - x[..., :2] + offset).prod(-1) for x in (box, others))
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]) + offset
    intersection = sides.clip(0).prod(-1)
    with np.errstate(divide='ignore', invalid='ignore'):  # empty boxes have area 0
        return intersection / (area + areas - intersection)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS on the CPU: lowers scores (N,) of overlapping boxes (N, 4); writes boxes and scores to dets (N, 5).

    Args:
        method: 0 naive, 1 linear, 2 gaussian.

    Returns:
        Kept indices in the order of dets.
    """
    box, score = (x.detach().float().numpy() for x in (boxes, scores))
    score, order, n, i = score.copy(), np.arange(len(box)), len(box), 0
    while i < n:
        best = i + score[order[i:n]].argmax()
        order[[i, best]] = order[[best, i]]
        rest = order[i + 1 : n]
        iou = _iou(box, order[i], rest, offset)
        if method == 2:
            weight = np.exp(-(iou * iou) / np.float32(sigma))
        else:
            weight = np.where(iou >= np.float32(iou_threshold), 1 - iou if method else np.float32(0), np.float32(1))
        score[rest] *= weight
        # As in mmcv, the last kept box replaces a removed one, so that ties are broken in the same order.
        keep = ~(score[rest] < np.float32(min_score))
        count = keep.sum()
        rest[:count][~keep[:count]] = rest[count:][keep[count:]][::-1]
        i, n = i + 1, i + 1 + count
    kept = order[:n]
    dets[:n] = torch.from_numpy(np.concatenate((box[kept], score[kept, None]), 1))
    return torch.from_numpy(kept)


def nms_match(dets: Tensor, iou_threshold: float) -> List[List[int]]:
    """Groups boxes with scores (N, 5); each group is a kept index followed by the indices that it suppresses."""
    boxes = dets[:, :4].detach().float().numpy()
    order, groups = dets[:, 4].sort(descending=True)[1].numpy(), []
    while len(order):
        first, rest = order[0], order[1:]
        suppressed = _iou(boxes, first, rest) >= np.float32(iou_threshold)
        groups.append([int(first), *rest[suppressed].tolist()])
        order = rest[~suppressed]
    return groups


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Writes overlaps of boxes (N, 4) and (M, 4) to ious, (N, M) or, if aligned, (N,).

    Args:
        mode: 0 intersection over union, 1 intersection over the area of the first box.
    """
    if not aligned:
        bboxes1 = bboxes1[:, None]
    sides = torch.min(bboxes1[..., 2:], bboxes2[..., 2:]) - torch.max(bboxes1[..., :2], bboxes2[..., :2]) + offset
    intersection = sides.clamp(min=0).prod(-1)
    area1, area2 = ((x[..., 2:] - x[..., :2] + offset).prod(-1) for x in (bboxes1, bboxes2))
    ious.copy_(intersection / (area1 if mode else area1 + area2 - intersection))


# Rotated boxes, (N, 5): center x and y, width, height, and angle in radians from the x towards the y axis


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _corners(boxes: Tensor) -> Tuple[Tensor, Tensor]:
    """Returns the corners of boxes (..., 5) relative to their centers, and the edges between them.

    Both are (..., 4, 2); edge i leads from corner i to the next one.
    """
    signs = boxes.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    x, y = (boxes[..., None, 2:4] / 2 * signs).unbind(-1)
    cos, sin = boxes[..., 4:].cos(), boxes[..., 4:].sin()
    corners = torch.stack((x * cos - y * sin, x * sin + y * cos), -1)
    return corners, corners.roll(-1, -2) - corners


def _clipped(corners: Tensor, edges: Tensor, others: Tensor, sides: Tensor) -> Tensor:
    """Integrates ``x dy - y dx`` along the segments of a box's edges that lie inside another box, (...)."""
    sides = sides[..., None, :, :]
    inside = _cross(sides, corners[..., None, :] - others[..., None, :, :])  # (..., edges, sides), > 0 if inside
    slope = _cross(sides, edges[..., None, :]) + 0.0  # no -0.0
    t = -inside / slope  # position in [0, 1] at which an edge crosses a side
    start = t.where(slope >= 0, torch.zeros_like(t)).amax(-1).clamp(min=0)
    end = t.where(slope < 0, torch.ones_like(t)).amin(-1).clamp(max=1)
    return (_cross(corners, edges) * (end - start).clamp(min=0)).sum(-1)


def _iou_rotated(boxes1: Tensor, boxes2: Tensor, mode: int = 0) -> Tensor:
    """Computes the overlap of pairs of boxes (..., 5) by Green's theorem.

    The boundary of the intersection consists of segments of both boundaries. The second box is enlarged by 1e-9, so
    that a common boundary is counted exactly once.
    """
    boxes1, boxes2 = boxes1.double(), boxes2.double()
    first, edges1 = _corners(boxes1)
    second, edges2 = _corners(boxes2 * (1 + boxes2.new_tensor([0, 0, 1e-9, 1e-9, 0])))
    first = first + (boxes1 - boxes2)[..., None, :2]
    intersection = (_clipped(first, edges1, second, edges2) + _clipped(second, edges2, first, edges1)) / 2
    area1, area2 = (x[..., 2:4].prod(-1) for x in (boxes1, boxes2))
    iou = intersection / (area1 if mode else area1 + area2 - intersection)
    return iou.where((area1 >= 1e-14) & (area2 >= 1e-14), torch.zeros_like(iou))


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Writes overlaps of boxes (N, 5) and (M, 5) to ious, (N * M,) or, if aligned, (N,).

    Args:
        mode_flag: 0 intersection over union, 1 intersection over the area of the first box.
    """
    if aligned:
        ious.copy_(_iou_rotated(boxes1, boxes2, mode_flag))
        return
    rows = 1 + 2**16 // (1 + len(boxes2))  # about 2**16 pairs per chunk bound the memory
    for chunk, target in zip(boxes1.split(rows), ious.view(len(boxes1), len(boxes2)).split(rows)):
        target.copy_(_iou_rotated(chunk[:, None], boxes2, mode_flag))


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Selects boxes (N, 5), separately for each label (N,) if multi_label; returns kept indices by falling score."""
    order, kept = scores.sort(descending=True)[1], []
    while len(order):
        first, rest = order[0], order[1:]
        suppressed = _iou_rotated(dets[first, :5], dets[rest, :5]) >= float(np.float32(iou_threshold))
        if multi_label:
            suppressed &= labels[rest] == labels[first]
        kept.append(first)
        order = rest[~suppressed]
    return torch.stack(kept) if kept else order


# RoI pooling: rois are (N, 5), image index and box


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "roi_align with pool_mode='max' requires compiled mmcv; torchvision supports only pool_mode='avg'"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pools regions of feature maps (B, C, H, W) to output (N, C, aligned_height, aligned_width)."""
    _check_pool_mode(pool_mode)
    size = aligned_height, aligned_width
    output.copy_(
        torch.ops.torchvision.roi_align(*_to_float32(input, rois), spatial_scale, *size, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the gradient of the feature maps, (B, C, H, W)."""
    _check_pool_mode(pool_mode)
    size = aligned_height, aligned_width, *grad_input.shape
    backward = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(backward(*_to_float32(grad_output, rois), spatial_scale, *size, sampling_ratio, aligned))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Max-pools each bin of regions of feature maps (B, C, H, W).

    It does not call ``torchvision.ops.roi_pool``, which rounds the boxes to whole pixels; mmcv rounds only the bins.

    Args:
        output: Maxima, (N, C, pooled_height, pooled_width), 0 in empty bins.
        argmax: Index y * W + x of each maximum in its map, -1 in empty bins.
    """
    height, width = input.shape[-2:]
    input, rois = _to_float32(input, rois)
    output.zero_()
    argmax.fill_(-1)

    def bins(low: Tensor, high: Tensor, count: int, size: int) -> Tensor:
        """Returns start and end pixel (exclusive) of each bin, (N, count, 2)."""
        step, i = ((high - low) / count)[:, None], torch.arange(count, device=low.device)
        ends = torch.stack(((i * step + low[:, None]).floor(), ((i + 1) * step + low[:, None]).ceil()), -1)
        ends = ends.clamp(0, size).long()
        return ends * (high > low)[:, None, None]  # a malformed box has empty bins

    x1, y1 = rois[:, 1] * spatial_scale, rois[:, 2] * spatial_scale
    x2, y2 = (rois[:, 3] + 1) * spatial_scale, (rois[:, 4] + 1) * spatial_scale
    columns = bins(x1, x2, pooled_width, width).tolist()
    rows = bins(y1, y2, pooled_height, height).tolist()
    for n, image in enumerate(rois[:, 0].long().tolist()):
        for j, (left, right) in enumerate(columns[n]):
            if left >= right:
                continue
            # Of equal values mmcv takes the first in row-major order: reduce columns first, then rows.
            values, x = input[image, :, :, left:right].max(-1)  # (C, H)
            for i, (top, bottom) in enumerate(rows[n]):
                if top < bottom:
                    output[n, :, i, j], y = values[:, top:bottom].max(-1)
                    y = y + top
                    argmax[n, :, i, j] = y * width + left + x.gather(1, y[:, None])[:, 0]


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes the gradient of the feature maps, (B, C, H, W)."""
    images, channels, height, width = grad_input.shape
    maps = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # (N, C)
    index = maps[..., None, None] * (height * width) + argmax
    (grad_output,) = _to_float32(grad_output)
    grad = grad_output.new_zeros(images * channels * height * width)
    grad.index_add_(0, index[argmax >= 0], grad_output[argmax >= 0])
    grad_input.copy_(grad.view_as(grad_input))


# Deformable convolutions: offsets are (B, groups * 2 * kh * kw, H, W) as (y, x) pairs, as in torchvision


def _deform_conv(name: str, tensors: Tuple[Tensor, ...], *geometry: Any) -> Any:
    """Calls torchvision's forward or backward operator in float32 or float64."""
    return getattr(torch.ops.torchvision, name)(*_to_float32(*tensors), *geometry)


def _dummy_mask_and_bias(input: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Returns placeholders for the mask and the bias of a convolution that has neither."""
    return input.new_zeros(len(input), 1), input.new_zeros(len(weight))


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (DCN v1) of feature maps (B, C, H, W) to output (B, C', H', W')."""
    tensors = input, weight, offset, *_dummy_mask_and_bias(input, weight)
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group, False
    output.copy_(_deform_conv('deform_conv2d', tensors, *geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Writes the gradients of the feature maps and of the offsets."""
    tensors = gradOutput, input, weight, offset, *_dummy_mask_and_bias(input, weight)
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group, False
    grads = _deform_conv('_deform_conv2d_backward', tensors, *geometry)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Adds ``scale`` times the gradient of the weight, which does not depend on the weight, to gradWeight."""
    tensors = gradOutput, input, gradWeight, offset, *_dummy_mask_and_bias(input, gradWeight)
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group, False
    gradWeight.add_(_deform_conv('_deform_conv2d_backward', tensors, *geometry)[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution (DCN v2) of feature maps (B, C, H, W) to output (B, C', H', W')."""
    tensors = input, weight, offset, mask, bias if with_bias else input.new_zeros(len(weight))
    geometry = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, True
    output.copy_(_deform_conv('deform_conv2d', tensors, *geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Writes the gradients of feature maps, weight, offset, mask and, if ``with_bias``, bias."""
    tensors = grad_output, input, weight, offset, mask, bias if with_bias else input.new_zeros(len(weight))
    geometry = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, True
    grads = _deform_conv('_deform_conv2d_backward', tensors, *geometry)
    targets = (grad_input, grad_weight, grad_offset, grad_mask, *([grad_bias] if with_bias else []))
    for target, grad in zip(targets, grads):
        target.copy_(grad)


# Multi-scale deformable attention: mmcv's PyTorch implementation


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention.

    Args:
        value: Values, (B, keys, heads, C).
        value_spatial_shapes: Height and width of each level, (levels, 2).
        sampling_locations: Normalized x and y in [0, 1], (B, queries, heads, levels, points, 2).
        attention_weights: Attention weights, (B, queries, heads, levels, points).

    Returns:
        Output, (B, queries, heads * C).
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch as attention

    return attention(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Writes the gradients of values, sampling locations and attention weights."""
    inputs = [x.detach().requires_grad_() for x in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            inputs[0], value_spatial_shapes, value_level_start_index, *inputs[1:], im2col_step
        )
    targets = grad_value, grad_sampling_loc, grad_attn_weight
    for target, grad in zip(targets, torch.autograd.grad(output, inputs, grad_output)):
        target.copy_(grad)


# Focal losses: target holds class indices (N,); in the sigmoid form any other index is background


def _apply_class_weight(loss: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Multiplies rows by the weights (C,) of their classes, unless ``weight`` is empty."""
    if not weight.numel():
        return loss
    valid = (target >= 0) & (target < len(weight))
    rows = weight.to(loss)[target.where(valid, torch.zeros_like(target))].where(valid, loss.new_ones(()))
    return loss * (rows[:, None] if loss.dim() == 2 else rows)


def _sigmoid_focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float, positive: Callable, negative: Callable
) -> Tensor:
    """Applies ``positive`` to the probability of each row's class and ``negative`` to all others, (N, C)."""
    (input,) = _to_float32(input)
    p = input.sigmoid()
    is_class = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return _apply_class_weight(torch.where(is_class, -alpha * positive(p), (alpha - 1) * negative(p)), target, weight)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the sigmoid focal loss of logits (N, C) to output (N, C)."""

    def positive(p: Tensor) -> Tensor:
        return (1 - p) ** gamma * p.clamp(min=TINY).log()

    def negative(p: Tensor) -> Tensor:
        return p**gamma * (1 - p).clamp(min=TINY).log()

    output.copy_(_sigmoid_focal_loss(input, target, weight, alpha, positive, negative))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the derivative of each loss with respect to its logit to grad_input (N, C)."""

    def positive(p: Tensor) -> Tensor:
        return (1 - p) ** gamma * (1 - p - gamma * p * p.clamp(min=TINY).log())

    def negative(p: Tensor) -> Tensor:
        return p**gamma * (gamma * (1 - p) * (1 - p).clamp(min=TINY).log() - p)

    grad_input.copy_(_sigmoid_focal_loss(input, target, weight, alpha, positive, negative))


def _probability_of(target: Tensor, softmax: Tensor) -> Tensor:
    """Returns the probability (N,) of each row's class; for a negative index, the probability of class 0."""
    return softmax.gather(1, target.clamp(min=0)[:, None])[:, 0]


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the softmax focal loss of probabilities (N, C) to output (N,); 0 for a negative class index."""
    (input,) = _to_float32(input)
    p = _probability_of(target, input)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log()
    output.copy_(_apply_class_weight(loss * (target >= 0), target, weight))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes derivatives with respect to the logits to grad_input (N, C), given probabilities (N, C)."""
    (input,) = _to_float32(input)
    p = _probability_of(target, input)
    slope = alpha * (gamma * (1 - p) ** (gamma - 1) * p * p.clamp(min=TINY).log() - (1 - p) ** gamma)
    slope = _apply_class_weight(slope * (target >= 0), target, weight)
    buff.copy_(slope)
    is_class = target[:, None] == torch.arange(input.shape[1], device=input.device)
    grad_input.copy_(slope[:, None] * (is_class.to(input) - input))
