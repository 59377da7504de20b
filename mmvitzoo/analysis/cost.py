"""Parameters, FLOPs and activations of a config's model.

Models run on fake tensors, which have a shape but no data, so that the largest model takes seconds and little memory.
A multiply-add counts as one FLOP, as in tables of vision models. There are two conventions:

- all operations: every matrix product and convolution, including the products in attention; 5 FLOPs per element of a
  LayerNorm or GroupNorm, 2 of a BatchNorm, 4 of a bilinear and 1 of a nearest interpolation, and 1 per input element
  of an adaptive pooling. fvcore and MMEngine count the same, but miss fused attention.
- modules only: without the products in attention, as MMDetection 2.x and MMSegmentation 0.x counted.

Two-stage detectors are counted with 1000 boxes and 100 masks, as in MMDetection 2.x. Requires PyTorch >= 2.3.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any, Callable, Optional, Sequence, Tuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..models.backbones import vit
from ..models.backbones.base import image_channels
from ..models.layers import attention
from ..models.layers.rel_pos import rel_pos_scores
from ..zoo import type_name

aten = torch.ops.aten
# Products of two activations. A product with a weight has no batch dimension.
ATTENTION_OPS = (aten.bmm, aten.baddbmm)
NUM_BOXES, NUM_MASKS = 1000, 100
TWO_STAGE_PARTS = {'rpn_head', 'roi_head'} | {
    f'roi_head.{name}' for name in ('bbox_roi_extractor', 'bbox_head', 'mask_roi_extractor', 'mask_head')
}


@dataclass
class Cost:
    """Cost of a model for one image.

    Attributes:
        shape: (H, W) of the image in pixels.
        params: Number of parameters.
        flops: FLOPs of all operations.
        module_flops: FLOPs of modules only.
        activations: Number of elements in the results of convolutions and matrix products.
    """

    shape: Tuple[int, int]
    params: int
    flops: int
    module_flops: int
    activations: int


def per_output(factor: int) -> Callable[..., int]:
    """Returns a formula for :class:`FlopCounterMode`: ``factor`` multiply-adds per element of the first result."""

    def formula(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        return 2 * factor * prod(out_shape if isinstance(out_shape, torch.Size) else out_shape[0])

    return formula


def pooling(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Formula for :class:`FlopCounterMode`: one multiply-add per element of a map, none of other inputs."""
    return 2 * prod(shape) if len(shape) == 4 else 0


# Operators that FlopCounterMode does not count.
FORMULAS = {
    aten.native_layer_norm.default: per_output(5),
    aten.native_group_norm.default: per_output(5),
    aten.native_batch_norm.default: per_output(2),
    aten.upsample_bilinear2d.default: per_output(4),
    aten.upsample_nearest2d.default: per_output(1),
    aten.grid_sampler_2d.default: per_output(4),
    aten._adaptive_avg_pool2d.default: pooling,
    aten.mean.dim: pooling,  # adaptive pooling to 1 x 1
}
# The mode looks a formula up by the packet, but decomposes operators that are not listed as overloads.
FORMULAS.update({op.overloadpacket: formula for op, formula in FORMULAS.items()})


class ActivationCounter(TorchDispatchMode):
    """Counts the elements in the results of convolutions and matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += out.numel()
        return out


def rel_pos_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """:func:`.rel_pos_attention_biased` in one chunk: a bias without data takes no memory."""
    h, w = rel_pos_scores(q.unflatten(2, (len(rel_h), len(rel_w))), rel_h, rel_w)
    bias = (h[..., None] + w[..., None, :]).flatten(-2).flatten(2, 3)  # (B, heads, Hq * Wq, H * W)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def empty_pos_embed(pos_embed: Tensor, grid: Sequence[int], size: Sequence[int], *args: Any) -> Tensor:
    """Returns a tensor of the shape of :func:`.resize_pos_embed`, (1, H, W, C) for ``size`` (H, W)."""
    return pos_embed.new_empty(1, *size, pos_embed.shape[-1])


def count(model: nn.Module, forward: Callable[[], Any]) -> Tuple[Counter, int]:
    """Counts the FLOPs, by operator, and the activations of a forward pass.

    Args:
        model: Model in eval mode.
        forward: Function that runs the model.
    """
    with ExitStack() as stack:
        # Attention is counted as two products, without the additional channels that flash kernels need.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(patch.object(attention, 'pad_for_flash', lambda *qkv: qkv))
        # Positions are resized for an image size, not for each image; other counters do not count it either.
        stack.enter_context(patch.object(vit, 'resize_pos_embed', empty_pos_embed))
        for module in model.modules():
            if hasattr(module, 'rel_pos_kernel'):
                stack.enter_context(patch.object(module, 'rel_pos_kernel', rel_pos_attention))
            # FlopCounterMode fails on views of parameters that require gradients. Weights of linear layers have to
            # require them: otherwise torch turns some products of expanded tensors into batched ones.
            for parameter in module.parameters(recurse=False):
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(isinstance(module, (nn.Linear, nn.MultiheadAttention)))
        stack.enter_context(torch.no_grad())
        activations = stack.enter_context(ActivationCounter())
        flops = stack.enter_context(FlopCounterMode(display=False, custom_mapping=FORMULAS))
        forward()
    # torch counts a multiply-add as two.
    return Counter({op: n // 2 for op, n in flops.get_flop_counts().get('Global', {}).items()}), activations.total


def count_flops(model: nn.Module, x: Tensor) -> Counter:
    """Counts the FLOPs of a forward pass without computing it.

    Args:
        model: Any module in eval mode, before :func:`.optimize_for_inference`. It is not changed.
        x: Input of the model, of which only shape, type and device matter.

    Returns:
        FLOPs by operator, such as ``torch.ops.aten.convolution``.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(x)
        return count(model, lambda: model(x))[0]


def measure(config: Config, shape: Optional[Sequence[int]] = None) -> Cost:
    """Measures the cost of a config's model.

    Args:
        config: Config of MMDetection, MMSegmentation or MMPretrain.
        shape: (H, W) of the image in pixels. None is the size of published tables, see :func:`default_shape`.

    Raises:
        NotImplementedError: A detector with parts that would not be counted.
    """
    init_default_scope(config.default_scope)
    shape = tuple(shape or default_shape(config))
    try:
        # Not on fake tensors, whose copies by constructors (copy.deepcopy) access memory that does not exist.
        with torch.device('meta'):
            model = MODELS.build(config.model)
    except RuntimeError:  # a constructor that reads values of tensors
        model = MODELS.build(config.model)
    model.eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device='cpu')
        x = torch.empty(1, image_channels(model), *shape)
        flops, activations = count(model, lambda: forward(model, x))
    return Cost(
        shape,
        params=sum(parameter.numel() for parameter in model.parameters()),
        flops=sum(flops.values()),
        module_flops=sum(n for op, n in flops.items() if op not in ATTENTION_OPS),
        activations=activations,
    )


def default_shape(config: Config) -> Tuple[int, int]:
    """Returns the (H, W) in pixels for which published tables count such a model, from the config's test pipeline."""
    if config.default_scope == 'mmseg':
        return 512, 2048
    transforms = config.get('test_pipeline') or config.test_dataloader.dataset.pipeline
    sizes = {type_name(x['type']): x.get('crop_size') or x.get('scale') for x in transforms}
    if config.default_scope == 'mmpretrain':
        size = sizes.get('CenterCrop') or 224
        return (size, size) if isinstance(size, int) else tuple(size)
    size = sizes.get('Resize') or (1333, 800)
    return (size[1], size[0]) if size[0] == size[1] else (800, 1280)


def forward(model: nn.Module, x: Tensor) -> None:
    """Runs all parts of a model but the postprocessing, whose cost depends on the image.

    Args:
        model: Classifier, segmentor or detector.
        x: Image, (1, C, H, W).
    """
    if hasattr(model, 'decode_head'):
        model(x)
        return
    parts = {name for name, _ in model.named_children()} - {'data_preprocessor', 'backbone', 'neck'}
    parts |= {f'roi_head.{name}' for name, _ in getattr(model, 'roi_head', nn.Module()).named_children()}
    features = model.extract_feat(x)
    if parts == {'head'}:
        model.head(features)
    elif 'roi_head' in parts and parts <= TWO_STAGE_PARTS:
        model.rpn_head(features)
        for name, num_rois in (('bbox_head', NUM_BOXES), ('mask_head', NUM_MASKS)):
            heads = getattr(model.roi_head, name, [])
            for head in heads if isinstance(heads, (nn.ModuleList, list)) else [heads]:
                head(x.new_empty(num_rois, head.in_channels, *head.roi_feat_size))
    elif parts == {'bbox_head'}:
        model.bbox_head(features)
    elif hasattr(model, 'forward_transformer'):
        forward_detr(model, features, x.shape[2:])
    else:
        unknown = ', '.join(sorted(parts - TWO_STAGE_PARTS))
        raise NotImplementedError(f'{type(model).__name__} has parts that cannot be counted: {unknown}')


def forward_detr(model: nn.Module, features: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Runs the transformer and the head of a DETR.

    Args:
        model: Detector.
        features: Maps of the neck, (1, C, H', W').
        shape: (H, W) of the image in pixels.
    """
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=shape))
    # Deformable DETR reads the sizes of its maps from tensors. Fake tensors keep the values of small constants.
    constants = patch.object(fake_tensor, 'CONSTANT_NUMEL_LIMIT', 2 * len(features))
    with constants, patch.object(torch, '_shape_as_tensor', lambda x: torch.tensor(x.shape)):
        model.bbox_head(**model.forward_transformer(features, [sample]))
