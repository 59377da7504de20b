"""Attention weights of one query in chosen blocks of a backbone.

In softmax attention, query i weighs the value of key j with ``p_ij >= 0``; the weights of all keys that it attends to,
those of its window or of the whole image, sum to 1. Weight outside the map belongs to a class token or to the zeros
that pad the windows of PlainViT, ViTAE and MViTv2. ScalableViT masks such padding. Two additions to the output of
attention are not included: the queries of MViTv2 and the convolution on the values of ScalableViT.

MPViT's attention is factorized, ``q (softmax(k)^T v)``, with the softmax over tokens for each channel. The weight of
value j is ``q_i . softmax(k)_j`` times the scale. It may be negative, and the weights have no fixed sum. The relative
positions of MPViT, a convolution on the values, are not included.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..models.backbones.base import AttentionLayer, Backbone
from ..models.layers import Attention, window_partition
from ..models.layers.padding import ceil_div
from .grid import Grid, get_backbone, token_grid
from .images import draw_box, panels


@dataclass
class AttentionMap:
    """Attention weights of one query.

    Attributes:
        block: Index of the block. Parallel paths of MPViT share one index.
        attn_type: Type of the attention, see :class:`.AttentionLayer`.
        query: (row, column) of the query on its map.
        query_grid: Grid of the queries on the image.
        key_grid: Grid of the keys on the image.
        window: Left, top, right and bottom border, in pixels, of the area that the query attends to.
        weights: (heads, H, W), the weight of each key of the map.
        outside_weight: (heads,), the weight of a class token or of the padding of a window.
    """

    block: int
    attn_type: str
    query: Tuple[int, int]
    query_grid: Grid
    key_grid: Grid
    window: Tuple[int, int, int, int]
    weights: Tensor
    outside_weight: Tensor


def attention_maps(
    model: nn.Module, image: Tensor, point: Sequence[int], blocks: Optional[Sequence[int]] = None
) -> List[AttentionMap]:
    """Computes the attention weights of the token at a point of an image.

    Args:
        model: Backbone of this package, or a model with one as ``backbone``, in eval mode.
        image: (1, 3, H, W), normalized, on the device of the model.
        point: (x, y) in pixels. The query is the token with the nearest center.
        blocks: Indices of blocks. None selects the last block of each attention type in each stage of a pyramid or
            quarter of a plain backbone.

    Returns:
        One map per block in increasing order. MPViT has one map per path of a block.

    Raises:
        ValueError: The point is outside the image, a block does not exist, or the backbone is not from this package,
            has no attention layers or does not accept the image.
    """
    backbone = get_backbone(model)
    height, width = image.shape[2:]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f'point is (x, y) from (0, 0) to ({width - 1}, {height - 1}), got ({point[0]}, {point[1]})')
    layers = backbone.attention_layers()
    if blocks is None:
        last = {(layer.stage, layer.attn_type): layer for layer in layers}.values()
        layers = sorted(last, key=lambda layer: layer.block)
    else:
        num_blocks = layers[-1].block + 1
        if not set(blocks) <= set(range(num_blocks)):
            raise ValueError(f'blocks are from 0 to {num_blocks - 1}, got {", ".join(map(str, blocks))}')
        layers = [layer for layer in layers if layer.block in blocks]
    inputs: Dict[nn.Module, Tuple[Any, ...]] = {}

    def save_input(attn: nn.Module, args: Tuple[Any, ...]) -> None:
        inputs[attn] = args

    handles = [layer.attn.register_forward_pre_hook(save_input) for layer in layers]
    try:
        with torch.no_grad():
            backbone(image)
            return [attention_map(backbone, layer, inputs[layer.attn], (height, width), point) for layer in layers]
    finally:
        for handle in handles:
            handle.remove()


def attention_map(
    backbone: Backbone, layer: AttentionLayer, inputs: Sequence[Any], image_size: Tuple[int, int], point: Sequence[int]
) -> AttentionMap:
    """Computes the attention weights of one layer for the query at a point.

    Args:
        backbone: Backbone of the layer.
        layer: Attention layer.
        inputs: Arguments of the layer's ``forward``, for a batch of one.
        image_size: (H, W) in pixels.
        point: (x, y) in pixels.
    """
    query_grid = token_grid(backbone, layer.q_stride)
    key_grid = token_grid(backbone, layer.k_stride)
    if not layer.overlapping_keys:  # the first patch begins with the first query
        key_grid = Grid(layer.k_stride, query_grid.origin)
    q_size, k_size = query_grid.size(image_size), key_grid.size(image_size)
    row, col = (query_grid.nearest(image_size[axis], axis)[point[1 - axis]].item() for axis in (0, 1))
    key_indices = torch.arange(1, 1 + k_size[0] * k_size[1])  # 0 is outside the map
    if layer.window_size:
        side, k_side = (
            to_2tuple(layer.window_size)[0] // to_2tuple(stride)[0] for stride in (layer.q_stride, layer.k_stride)
        )
        window = row // side * ceil_div(q_size[1], side) + col // side
        token = row % side * side + col % side
        windows = window_partition(key_indices.view(1, *k_size, 1), k_side)
        key_indices = windows[window].flatten()
    else:
        side, window, token = max(q_size), 0, layer.num_prefix_tokens + row * q_size[1] + col
        key_indices = F.pad(key_indices, (layer.num_prefix_tokens, 0))
    # The other layers have arguments that do not change the weights.
    rope = inputs[1:] if isinstance(layer.attn, Attention) else ()
    weights = layer.attn.attention_weights(inputs[0], window, token, *rope).cpu()
    weights = weights.new_zeros(len(weights), 1 + k_size[0] * k_size[1]).index_add_(1, key_indices, weights)
    top, bottom = query_grid.pixels(row // side * side, side, image_size[0], axis=0)
    left, right = query_grid.pixels(col // side * side, side, image_size[1], axis=1)
    return AttentionMap(
        layer.block,
        layer.attn_type,
        (row, col),
        query_grid,
        key_grid,
        (left, top, right, bottom),
        weights[:, 1:].unflatten(1, k_size),
        weights[:, 0],
    )


def draw_attention(
    image: np.ndarray, maps: Sequence[AttentionMap], point: Sequence[int], head: Optional[int] = None
) -> Figure:
    """Draws attention weights over the image.

    Args:
        image: (H, W, 3) in RGB, from 0 to 255.
        maps: Result of :func:`attention_maps`.
        point: (x, y) in pixels, as given to :func:`attention_maps`.
        head: Index of the head. None draws the mean over all heads.

    Returns:
        A figure 1200 pixels wide.

    Raises:
        ValueError: A block does not have this head.
    """
    size = image.shape[:2]
    selected, texts = [], [('image', f'{size[0]} x {size[1]} pixels\npoint ({point[0]}, {point[1]})')]
    for x in maps:
        num_heads = len(x.weights)
        if head is not None and head not in range(num_heads):
            raise ValueError(f'the heads of block {x.block} are from 0 to {num_heads - 1}, got {head}')
        weights, outside = (y.mean(0) if head is None else y[head] for y in (x.weights, x.outside_weight))
        selected.append(weights)
        texts.append(describe(x, weights, outside.item()))
    columns = min((4, 3, 5), key=lambda columns: -len(texts) % columns)  # leaves the fewest panels empty
    figure, axes = panels(texts, size, min(columns, len(texts)))
    axes[0].imshow(image)
    gray = 0.6 * image.mean(-1, keepdims=True).repeat(3, -1) / 255
    for panel, x, weights in zip(axes[1:], maps, selected):
        rows, cols = (x.key_grid.nearest(size[axis], axis) for axis in (0, 1))
        heat = (weights / weights.abs().max().clamp(min=1e-12))[rows][:, cols].numpy()
        colors = dict(cmap='bwr', vmin=-1) if (weights < 0).any() else dict(cmap='inferno', vmin=0)
        panel.imshow(gray)
        panel.imshow(heat, vmax=1, alpha=0.9 * np.abs(heat) ** 0.5, **colors)
        (top, bottom), (left, right) = (x.query_grid.pixels(x.query[axis], 1, size[axis], axis) for axis in (0, 1))
        draw_box(panel, (left, top, right, bottom), 'cyan')
        if x.window != (0, 0, size[1], size[0]):
            draw_box(panel, x.window, 'white')
    for panel in axes:
        panel.plot(*point, '+', color='black', markersize=11, markeredgewidth=3)
        panel.plot(*point, '+', color='cyan', markersize=10, markeredgewidth=1.5)
    return figure


def describe(x: AttentionMap, weights: Tensor, outside_weight: float) -> Tuple[str, str]:
    """Returns the title of a panel and the text below it, for the weights of one head or the mean."""
    low, high = weights.min().item(), weights.max().item()
    values = f'{low:.2g} to {high:.2g}' if low < 0 else f'up to {high:.2g}'
    outside = f', {outside_weight:.1%} outside the map' if outside_weight else ''
    return (
        f'block {x.block}: {x.attn_type}, stride {x.query_grid}',
        f'keys of stride {x.key_grid}\n{values}{outside}',
    )
