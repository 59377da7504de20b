"""Deterministic calls of mmcv's compiled operators; as a program, writes their results to mmcv_ops.npz.

Each case calls functions of a module with the interface of ``mmcv._ext``, so that the same case runs with the
compiled module and with another. Needs compiled mmcv 2.1.0 as a program: python tests/data/make_mmcv_ops.py
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

PATH = Path(__file__).with_name('mmcv_ops.npz')
ROI_SIZES = (  # shape of the maps, number of boxes, size of the output, spatial scale
    ((2, 3, 12, 16), 9, (7, 7), 0.25),
    ((1, 2, 7, 5), 4, (3, 5), 1.0),
    ((2, 2, 20, 20), 0, (2, 2), 0.5),
)
CONVOLUTIONS = (  # batch, size, kernel, stride, padding, dilation, groups, groups of offsets
    (2, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    (2, (8, 8), (3, 3), (2, 1), (1, 1), (1, 1), 1, 4),
    (1, (9, 7), (3, 3), (1, 1), (2, 2), (2, 2), 2, 2),
    (2, (6, 5), (1, 1), (1, 1), (0, 0), (1, 1), 2, 1),
    (1, (7, 9), (2, 3), (2, 2), (0, 1), (1, 2), 1, 2),
)


def tensor(rng, *shape):
    """Returns normal numbers, the same with every version of NumPy and PyTorch."""
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def boxes(rng, n, size=100, places=6):
    """Returns boxes (n, 4) crowded around a few places, so that many overlap; some leave the image."""
    centers = rng.uniform(0, size, (places, 2))[rng.randint(0, places, n)] + rng.uniform(-8, 8, (n, 2))
    sides = rng.uniform(2, 40, (n, 2))
    return torch.from_numpy(np.concatenate((centers - sides / 2, centers + sides / 2), 1).astype(np.float32))


def scores(rng, n):
    """Returns distinct scores: mmcv's and torchvision's sorting differ in ties."""
    return torch.from_numpy(((rng.permutation(n) + 1) / (n + 1)).astype(np.float32))


def at_threshold():
    """Returns pairs of boxes (18, 4), far from each other, with an IoU of exactly 1/10, 2/10, ... 9/10."""
    pairs = [[[100 * i, 0, 100 * i + 10, 1], [100 * i, 0, 100 * i + i, 1]] for i in range(1, 10)]
    return torch.tensor(pairs, dtype=torch.float32).view(-1, 4)


def nms(ext, n, threshold, offset):
    rng = np.random.RandomState(n)
    return [ext.nms(boxes(rng, n), scores(rng, n), iou_threshold=threshold, offset=offset)]


def nms_at_threshold(ext, threshold):
    x = at_threshold()
    return [ext.nms(x, scores(np.random.RandomState(0), len(x)), iou_threshold=threshold, offset=0)]


def softnms(ext, n, method, offset, min_score, ties):
    rng = np.random.RandomState(n)
    x, score = boxes(rng, n), scores(rng, n)
    if ties:
        score = (score * 8).ceil() / 8
    dets = torch.zeros(n, 5)
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=min_score, method=method, offset=offset)
    kept = ext.softnms(x, score, dets, **options)
    return [kept, dets[: len(kept)]]


def softnms_at_threshold(ext, method, threshold):
    x, dets = at_threshold(), torch.zeros(18, 5)
    score = scores(np.random.RandomState(0), 18)
    options = dict(iou_threshold=threshold, sigma=0.5, min_score=0.001, method=method, offset=0)
    kept = ext.softnms(x, score, dets, **options)
    return [kept, dets[: len(kept)]]


def nms_match(ext, n, threshold):
    rng = np.random.RandomState(n)
    x = boxes(rng, n) if n else at_threshold()
    groups = ext.nms_match(torch.cat((x, scores(rng, len(x))[:, None]), 1), iou_threshold=threshold)
    return [torch.tensor([index for group in groups for index in (*group, -1)])]


def bbox_overlaps(ext, mode, aligned, offset):
    rng = np.random.RandomState(0)
    first, second = boxes(rng, 20), boxes(rng, 20 if aligned else 15)
    ious = torch.zeros(20) if aligned else torch.zeros(20, 15)
    ext.bbox_overlaps(first, second, ious, mode=mode, aligned=aligned, offset=offset)
    return [ious]


def rotated(rng, n):
    """Returns rotated boxes (n, 5)."""
    x = boxes(rng, n)
    angle = torch.from_numpy(rng.uniform(-3, 3, (n, 1)).astype(np.float32))
    return torch.cat(((x[:, :2] + x[:, 2:]) / 2, x[:, 2:] - x[:, :2], angle), 1)


def box_iou_rotated(ext, n, mode, aligned):
    rng = np.random.RandomState(n)
    first, second = rotated(rng, n), rotated(rng, n)
    ious = torch.zeros(n if aligned else n * n)
    ext.box_iou_rotated(first, second, ious, mode_flag=mode, aligned=aligned)
    return [ious]


def nms_rotated(ext, n, threshold):
    rng = np.random.RandomState(n)
    x, score = rotated(rng, n), scores(rng, n)
    order = score.sort(descending=True)[1]
    return [ext.nms_rotated(x, score, order, x[order], torch.zeros(0), threshold, False)]


def roi_align(ext, geometry, sampling_ratio, aligned):
    shape, n, size, scale = ROI_SIZES[geometry]
    rng = np.random.RandomState(n)
    image = torch.from_numpy(rng.randint(0, shape[0], (n, 1)).astype(np.float32))
    rois = torch.cat((image, boxes(rng, n, size=shape[2] / scale)), 1)
    none, output, grad = torch.zeros(0), torch.zeros(n, shape[1], *size), torch.zeros(shape)
    options = dict(aligned_height=size[0], aligned_width=size[1], spatial_scale=scale)
    options.update(sampling_ratio=sampling_ratio, pool_mode=1, aligned=aligned)
    ext.roi_align_forward(tensor(rng, *shape), rois, output, none, none, **options)
    ext.roi_align_backward(tensor(rng, *output.shape), rois, none, none, grad, **options)
    return [output, grad]


def convolution(rng, batch, size, kernel, stride, pad, dilation, groups, deform_groups):
    """Returns input, weight, offset, mask and gradient of the output."""
    out = [(size[i] + 2 * pad[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    places = deform_groups * kernel[0] * kernel[1]
    x, weight = tensor(rng, batch, 8, *size), tensor(rng, 6, 8 // groups, *kernel)
    offset, mask = 2 * tensor(rng, batch, 2 * places, *out), tensor(rng, batch, places, *out).sigmoid()
    return x, weight, offset, mask, tensor(rng, batch, 6, *out)


def deform_conv(ext, geometry):
    x, weight, offset, _, grad = convolution(np.random.RandomState(geometry), *CONVOLUTIONS[geometry])
    batch, _, kernel, stride, pad, dilation, groups, deform_groups = CONVOLUTIONS[geometry]
    options = dict(kW=kernel[1], kH=kernel[0], dW=stride[1], dH=stride[0], padW=pad[1], padH=pad[0])
    options.update(dilationW=dilation[1], dilationH=dilation[0], group=groups, deformable_group=deform_groups)
    options.update(im2col_step=batch)
    output, grads = torch.zeros_like(grad), [torch.zeros_like(x) for x in (x, offset, weight)]
    buffers = torch.zeros(0), torch.zeros(0)
    ext.deform_conv_forward(x, weight, offset, output, *buffers, **options)
    ext.deform_conv_backward_input(x, offset, grad, grads[0], grads[1], weight, buffers[0], **options)
    grads[2] += 1  # mmcv adds to what is there
    ext.deform_conv_backward_parameters(x, offset, grad, grads[2], *buffers, scale=0.5, **options)
    return [output, *grads]


def modulated_deform_conv(ext, geometry, with_bias):
    rng = np.random.RandomState(geometry)
    x, weight, offset, mask, grad = convolution(rng, *CONVOLUTIONS[geometry])
    _, _, kernel, stride, pad, dilation, groups, deform_groups = CONVOLUTIONS[geometry]
    bias = tensor(rng, 6) if with_bias else torch.zeros(0)
    options = dict(kernel_h=kernel[0], kernel_w=kernel[1], stride_h=stride[0], stride_w=stride[1])
    options.update(pad_h=pad[0], pad_w=pad[1], dilation_h=dilation[0], dilation_w=dilation[1])
    options.update(group=groups, deformable_group=deform_groups, with_bias=with_bias)
    output, grads = torch.zeros_like(grad), [torch.zeros_like(x) for x in (x, weight, bias, offset, mask)]
    buffers = torch.zeros(0), torch.zeros(0)
    ext.modulated_deform_conv_forward(x, weight, bias, buffers[0], offset, mask, output, buffers[1], **options)
    ext.modulated_deform_conv_backward(x, weight, bias, buffers[0], offset, mask, buffers[1], *grads, grad, **options)
    return [output, *grads]


def cases(function, **options):
    """Returns a case for each combination of the options, under a name such as nms-200-0.3-0."""
    combinations = list(product(*options.values()))
    names = ['-'.join((function.__name__, *map(str, values))) for values in combinations]
    return {name: partial(function, **dict(zip(options, values))) for name, values in zip(names, combinations)}


TENTHS = [i / 10 for i in range(1, 10)]
CASES = {
    **cases(nms, n=(0, 1, 200), threshold=(0.3, 0.7), offset=(0, 1)),
    **cases(nms_at_threshold, threshold=TENTHS),
    **cases(softnms, n=(0, 1, 80), method=(0, 1, 2), offset=(0, 1), min_score=(0.001, 0.2), ties=(False, True)),
    **cases(softnms_at_threshold, method=(0, 1), threshold=TENTHS),
    **cases(nms_match, n=(1, 90), threshold=(0.3, 0.6)),
    **cases(nms_match, n=(0,), threshold=TENTHS),
    **cases(bbox_overlaps, mode=(0, 1), aligned=(False, True), offset=(0, 1)),
    **cases(box_iou_rotated, n=(0, 30), mode=(0, 1), aligned=(False, True)),
    **cases(nms_rotated, n=(1, 100), threshold=(0.1, 0.5)),
    **cases(roi_align, geometry=range(len(ROI_SIZES)), sampling_ratio=(0, 2), aligned=(False, True)),
    **cases(deform_conv, geometry=range(len(CONVOLUTIONS))),
    **cases(modulated_deform_conv, geometry=range(len(CONVOLUTIONS)), with_bias=(False, True)),
}

if __name__ == '__main__':
    from mmcv import _ext

    assert _ext.__file__.endswith('.so'), f'{_ext.__file__} is not compiled'
    results = {f'{name}/{i}': value.numpy() for name, case in CASES.items() for i, value in enumerate(case(_ext))}
    np.savez_compressed(PATH, **results)
