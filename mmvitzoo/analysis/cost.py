"""Counts what a config's model costs: parameters, operations and activations.

Only shapes are computed (but for the transformer of Deformable DETR), so that the largest models take
seconds and little memory. A FLOP is one multiplication with its addition, as tables of vision models
count. Two conventions:

- all operations: every matrix product and convolution, those within attention included, five per
  element of a LayerNorm or GroupNorm, two of a BatchNorm, four of a bilinear interpolation, one of
  a nearest one or of an adaptive pooling. So count fvcore and MMEngine, which know no fused attention.
- modules only: without products within attention, as MMDetection 2.x and MMSegmentation 0.x printed.

Detectors with regions of interest count 1000 boxes and 100 masks, as MMDetection 2.x did. Detectors with
parts that this does not know are refused. Needs PyTorch 2.3.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Operations for each element of the result.
ELEMENTWISE = {
    aten.native_layer_norm: 5,
    aten.native_group_norm: 5,
    aten.native_batch_norm: 2,
    aten._native_batch_norm_legit_no_training: 2,
    aten.upsample_bilinear2d: 4,
    aten.upsample_nearest2d: 1,
    aten.grid_sampler_2d: 4,
}
# Products of two activations; products with weights are matrix products without a batch.
WITHIN_ATTENTION = (aten.bmm, aten.baddbmm)
BOXES, MASKS = 1000, 100
TWO_STAGES = {'rpn_head', 'roi_head'} | {
    f'roi_head.{name}' for name in ('bbox_roi_extractor', 'bbox_head', 'mask_roi_extractor', 'mask_head')
}


@dataclass
class Cost:
    """What a model costs for one image.

    Attributes:
        shape: (H, W) of the image.
        params: Parameters.
        flops: Operations, all.
        module_flops: Operations of modules only.
        activations: Elements of the results of convolutions and matrix products.
    """

    shape: Tuple[int, int]
    params: int
    flops: int
    module_flops: int
    activations: int


class Counting(TorchDispatchMode):
    """Counts the operations under it, by kind."""

    def __init__(self):
        super().__init__()
        self.flops: Counter = Counter()
        self.activations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kind = func.overloadpacket
        if kind in flop_registry:
            # PyTorch counts multiplications and additions apart.
            self.flops[kind] += flop_registry[kind](*args, **kwargs, out_val=out) // 2
            self.activations += out.numel()
        elif kind in ELEMENTWISE:
            result = out if isinstance(out, Tensor) else out[0]
            self.flops[kind] += ELEMENTWISE[kind] * result.numel()
        elif kind is aten._adaptive_avg_pool2d or (kind is aten.mean and args[0].dim() == 4):
            self.flops[kind] += args[0].numel()
        return out


def measure(config: Config, shape: Optional[Sequence[int]] = None) -> Cost:
    """Counts the model of a config.

    Args:
        config: Of MMDetection, MMSegmentation or MMPretrain.
        shape: (H, W) of the image; None is that of published tables, see :func:`default_shape`.

    Raises:
        NotImplementedError: A detector with parts that would be left out.
    """
    init_default_scope(config.default_scope)
    shape = tuple(shape or default_shape(config))
    try:
        with torch.device('meta'):
            model = MODELS.build(config.model)
    except RuntimeError:  # of constructors that compute
        model = MODELS.build(config.model).to('meta')
    model.eval()
    params = sum(parameter.numel() for parameter in model.parameters())
    fast = torch.backends.mha.get_fastpath_enabled()
    # Attention by its products, not as one operation of which nothing is known.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Counting() as counting:
            forward(model, torch.empty(1, 3, *shape, device='meta'))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    modules = sum(n for kind, n in counting.flops.items() if kind not in WITHIN_ATTENTION)
    return Cost(shape, params, sum(counting.flops.values()), modules, counting.activations)


def default_shape(config: Config) -> Tuple[int, int]:
    """(H, W) for which published tables count models of this kind: by the images that the config tests on."""
    if config.default_scope == 'mmseg':
        return 512, 2048
    transforms = config.get('test_pipeline') or config.test_dataloader.dataset.pipeline
    sizes = {x['type']: x.get('crop_size') or x.get('scale') for x in transforms}
    if config.default_scope == 'mmpretrain':
        size = sizes.get('CenterCrop') or 224
        return (size, size) if isinstance(size, int) else tuple(size)
    size = sizes.get('Resize') or (1333, 800)
    return (size[1], size[0]) if size[0] == size[1] else (800, 1280)


def forward(model: nn.Module, x: Tensor) -> None:
    """All that has a cost, without the choice among predictions, which depends on the image."""
    if hasattr(model, 'decode_head'):
        model(x)
        return
    parts = {name for name, _ in model.named_children()} - {'data_preprocessor', 'backbone', 'neck'}
    parts |= {f'roi_head.{name}' for name, _ in getattr(model, 'roi_head', nn.Module()).named_children()}
    features = model.extract_feat(x)
    if parts == {'head'}:
        model.head(features)
    elif 'roi_head' in parts and parts <= TWO_STAGES:
        model.rpn_head(features)
        for name, regions in (('bbox_head', BOXES), ('mask_head', MASKS)):
            heads = getattr(model.roi_head, name, [])
            for head in heads if isinstance(heads, (nn.ModuleList, list)) else [heads]:
                head(x.new_empty(regions, head.in_channels, *head.roi_feat_size))
    elif parts == {'bbox_head'}:
        model.bbox_head(features)
    elif hasattr(model, 'forward_transformer'):
        detr(model, features, x.shape[2:])
    else:
        unknown = ', '.join(sorted(parts - TWO_STAGES))
        raise NotImplementedError(f'{type(model).__name__} has parts that are not known here: {unknown}')


def detr(model: nn.Module, features: Sequence[Tensor], shape: Sequence[int]) -> None:
    """The part of Deformable DETR that reads sizes of maps from tensors, which must exist for it."""
    from mmdet.structures import DetDataSample

    model.to_empty(device='cpu')
    for value in model.state_dict().values():
        value.zero_()
    sample = DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=shape))
    model.bbox_head(**model.forward_transformer([torch.zeros(y.shape) for y in features], [sample]))
