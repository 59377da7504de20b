"""Class activation maps: the regions of an image that raise the score of a class.

HiResCAM (https://arxiv.org/abs/2011.08891) multiplies a feature map with the gradient of the score, sums the channels
and keeps what is positive. It equals Grad-CAM (https://arxiv.org/abs/1610.02391) for heads that average the map.
Grad-CAM averages the gradient over the image, which is wrong for detectors and segmentors: the score of an object
depends on the map near the object. Captum computes the products.
"""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.backbones.vit import PlainViT
from .grid import Grid, get_backbone, output_grids, output_names, token_grid
from .images import panels

EPS = 1e-6  # scores closer to 0 or 1 have no logit


@dataclass
class ClassActivation:
    """Class activation map of one feature map.

    Attributes:
        name: Name of the feature map, such as ``'stage 3'``, or ``'block 5'`` of a plain backbone.
        grid: Grid of the tokens on the image.
        weights: (H', W'), at least 0.
    """

    name: str
    grid: Grid
    weights: np.ndarray


def class_activations(
    model: BaseModel, image: Tensor, category: Optional[int] = None
) -> Tuple[int, float, List[ClassActivation]]:
    """Computes the class activation maps of an image.

    The score of a class is a logit: in a classifier that of the image, in a segmentor the mean of the pixels that are
    labeled so (of all pixels, if there are none), in a one-stage detector that of the best anchor before objectness,
    centerness and NMS, in other detectors that of the best detection.

    Args:
        model: Model of MMPretrain, MMSegmentation or MMDetection with a backbone of this package, in eval mode, from
            :func:`mmvitzoo.inference.load_model`.
        image: (1, 3, H, W), normalized, on the device of the model.
        category: Index of the class. None is the class with the highest score; in a segmentor that of the most pixels.

    Returns:
        The index of the class, its score, and a map for each feature map that the backbone returns. A plain backbone
        whose head uses a class token has one, of the tokens that enter the last attention: behind it, the class token
        no longer depends on others. One whose head uses the mean of the tokens has that of the last norm.

    Raises:
        ValueError: The backbone is not from this package, the model has no such class, or a detector finds no object
            of the class.
        ImportError: Captum is not installed.
    """
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError:
        raise ImportError('class activation maps require Captum: pip install captum') from None
    backbone = get_backbone(model)
    names, grids = output_names(backbone), output_grids(backbone)
    layer, handle = model.backbone, None
    uses_tokens = getattr(layer, 'out_type', 'featmap') != 'featmap' or getattr(layer, 'output_cls_token', False)
    if uses_tokens:
        last = len(backbone.blocks) - 1
        names, grids = [f'block {last}'], [token_grid(backbone, backbone.strides[last])]
        layer, handle = expose_map(model.backbone, grids[0].size(image.shape[2:]))
    try:
        with DefaultScope.overwrite_default_scope(model.cfg.default_scope):
            scores, best = class_scores(model, image.clone().requires_grad_())
            if not len(scores):
                raise ValueError('no object is detected')
            if not scores.requires_grad:
                raise ValueError(f'the scores of {type(model).__name__} have no gradient')
            category = best if category is None else category
            if not 0 <= category < len(scores) or scores[category].isnan():
                if model.cfg.default_scope == 'mmdet':
                    raise ValueError(f'no object of class {category} is detected')
                raise ValueError(f'classes are from 0 to {len(scores) - 1}, got {category}')
            method = LayerGradientXActivation(lambda x: class_scores(model, x)[0][None], layer)
            # Feature maps that the score does not depend on get zeros.
            products = method.attribute(image, category, grad_kwargs=dict(materialize_grads=True))
    finally:
        if handle is not None:
            handle.remove()
    products = products if isinstance(products, tuple) else (products,)
    weights = [x[0].sum(0).relu().detach().cpu().numpy() for x in products]
    return category, scores[category].item(), [ClassActivation(*x) for x in zip(names, grids, weights)]


def expose_map(backbone: PlainViT, size: Tuple[int, int]) -> Tuple[nn.Module, RemovableHandle]:
    """Passes the last map on which the head depends, of (H', W') tokens, through a module as (B, C, H', W').

    For class tokens it is the map that enters the last attention, for means that of the last norm.

    Returns:
        The module, an identity, and the handle of the hook that calls it.
    """
    identity = nn.Identity()

    def hook(module: nn.Module, args: Tuple[Tensor], tokens: Tensor) -> Tensor:
        y, prefix = backbone._split(tokens, size)
        y = identity(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y if prefix is None else torch.cat([prefix, y.flatten(1, 2)], 1)

    # The mean of the tokens depends on all of the last map; the class token only on what attention mixes into it.
    last = len(backbone.blocks) - 1
    module = backbone.output_norm(last) if backbone.out_type == 'avg_featmap' else backbone.blocks[last].norm1
    return identity, module.register_forward_hook(hook)


def class_scores(model: BaseModel, image: Tensor) -> Tuple[Tensor, int]:
    """Computes the score of each class, (classes,), and the predicted class; see :func:`class_activations`.

    The score of a class of which a detector finds no object is nan.
    """
    sample = dict(img_shape=image.shape[2:], ori_shape=image.shape[2:], scale_factor=(1.0, 1.0))
    sample.update(pad_shape=image.shape[2:], batch_input_shape=image.shape[2:])
    if model.cfg.default_scope == 'mmpretrain':
        logits = model.head(model.extract_feat(image))
        if not isinstance(logits, Tensor):
            raise ValueError(f'only heads that return logits are supported, got {type(model.head).__name__}')
        return logits[0], logits[0].argmax().item()
    if model.cfg.default_scope == 'mmseg':
        logits = model.encode_decode(image, [dict(sample, padding_size=[0] * 4)])[0].flatten(1)  # (classes, H * W)
        is_class = nn.functional.one_hot(logits.argmax(0), len(logits)).T.to(logits.dtype)
        counts = is_class.sum(1)
        is_class = torch.where(counts[:, None] > 0, is_class, 1)
        return (logits * is_class).sum(1) / is_class.sum(1), counts.argmax().item()
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.structures import DetDataSample

    head = getattr(model, 'bbox_head', None)
    if isinstance(head, BaseDenseHead):  # its predictions are detached
        if not hasattr(head, 'cls_out_channels'):
            raise ValueError(f'only heads with class scores are supported, got {type(head).__name__}')
        num_channels = head.cls_out_channels  # of one anchor
        levels = head(model.extract_feat(image))[0]
        logits = torch.cat([x[0].unflatten(0, (-1, num_channels)).movedim(1, -1).flatten(0, 2) for x in levels])
        scores = (logits if head.use_sigmoid_cls else logits.softmax(-1)[:, :-1].logit(EPS)).amax(0)
        return scores, scores.argmax().item()
    (prediction,) = model.predict(image, [DetDataSample(metainfo=sample)], rescale=False)
    found = prediction.pred_instances
    if not len(found):
        return image.new_zeros(0), 0
    is_class = nn.functional.one_hot(found.labels).bool()  # (detections, classes)
    scores = torch.where(is_class, found.scores[:, None], -1).amax(0)
    scores = torch.where(is_class.any(0), scores.logit(EPS), float('nan'))
    return scores, found.labels[found.scores.argmax()].item()


def draw_class_activations(image: np.ndarray, category: str, score: float, maps: Sequence[ClassActivation]) -> Figure:
    """Draws class activation maps over an image.

    Args:
        image: (H, W, 3) in RGB, from 0 to 255.
        category: Name of the class.
        score: Score of the class.
        maps: Maps of :func:`class_activations`.

    Returns:
        A figure 1200 pixels wide. Colors range from zero, which is transparent, to the maximum of each map.
    """
    size = image.shape[:2]
    texts = [(category, f'logit {score:.3g}')]
    texts += [(f'{x.name}, stride {x.grid}', f'maximum {x.weights.max():.2g}') for x in maps]
    figure, axes = panels(texts, size, columns=min(max(len(texts), 2), 5))
    axes[0].imshow(image)
    for panel, x in zip(axes[1:], maps):
        panel.imshow(image)
        rows, cols = (x.grid.nearest(size[axis], axis) for axis in (0, 1))
        weights = x.weights[rows][:, cols] / max(x.weights.max(), 1e-12)
        panel.imshow(weights, cmap='turbo', vmin=0, vmax=1, alpha=0.8 * weights**0.5, interpolation='nearest')
    return figure
