"""What a point of an image attends to, in chosen blocks of a backbone.

Query i of a softmax attention weighs the value of key j with ``p_ij``, at least 0, and all those of its window, or
of the image, with 1 in sum. What of that is not on the map is on a class token, or on the zeros that pad windows of
PlainViT, ViTAE and MViTv2, which attend and are attended to; ScalableViT's windows have no weight there. What
MViTv2 and ScalableViT add to attention, a query and a convolution on the values, is not in it.

MPViT's attention is factorised, ``q (softmax(k)^T v)``, the softmax over tokens and for each channel. The weight
of value j is ``q_i . softmax(k)_j`` times the scale, of either sign and of any sum. What its relative positions
add, a convolution on the values, is not in it.
"""

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..models.backbones import MPViT, MViTv2, PlainViT, ScalableViT
from ..models.backbones.base import Backbone
from ..models.backbones.mpvit import NUM_HEADS, FactorizedAttention
from ..models.backbones.scalablevit import WindowAttention
from ..models.layers import partition_windows, split_linear
from .grid import Grid, backbone_of, plain_grid, pyramid_grid
from .images import outline, panels


@dataclass
class AttentionMap:
    """What one query of an attention attends to.

    Attributes:
        block: Number of the block, from 0 on; parallel paths of MPViT share one.
        kind: ``'global'``, ``'window'``, ``'scalable'``, or ``'path 3 x 3'`` and so on, by the patches of the path.
        query: The token, as (row, column) of its map.
        query_grid: Where the queries lie on the image.
        key_grid: Where the keys do.
        window: What the query can attend to, as left, upper, right and lower border in pixels of the image.
        weights: (heads, H, W), of each key.
        off_map: (heads,), the weight of the class token, or of the zeros that pad a window.
    """

    block: int
    kind: str
    query: Tuple[int, int]
    query_grid: Grid
    key_grid: Grid
    window: Tuple[int, int, int, int]
    weights: Tensor
    off_map: Tensor


def attention_maps(
    model: nn.Module, image: Tensor, point: Sequence[int], blocks: Optional[Sequence[int]] = None
) -> List[AttentionMap]:
    """What a point of an image attends to.

    Args:
        model: A backbone of this package, or a model that has one as ``backbone``, in eval mode.
        image: (1, 3, H, W), normalised, on the model's device.
        point: (x, y) in pixels of the image; the query is the token whose centre is nearest.
        blocks: Numbers of blocks, from 0 on. None chooses, in each stage of a pyramid and each quarter of a
            plain backbone, the last block of each kind.

    Returns:
        One map for each block, in rising order; of MPViT, one for each path of each block.

    Raises:
        ValueError: The point is outside of the image, there is no such block, the backbone is of another
            package or a family that is not known here, or it does not take the image.
    """
    backbone = backbone_of(model)
    height, width = image.shape[2:]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f'the point is within 0 to {width - 1} and 0 to {height - 1}, got {point[0]} and {point[1]}')
    layers = list(attention_layers(backbone))
    if blocks is None:
        last = {(layer.part, layer.kind): layer for layer in layers}.values()
        layers = sorted(last, key=lambda layer: layer.block)
    else:
        count = layers[-1].block + 1
        if not set(blocks) <= set(range(count)):
            raise ValueError(f'blocks are from 0 to {count - 1}, got {", ".join(map(str, blocks))}')
        layers = [layer for layer in layers if layer.block in blocks]
    inputs: Dict[nn.Module, Tensor] = {}

    def remember(attn: nn.Module, args: Tuple[Any, ...]) -> None:
        inputs[attn] = args[0]

    handles = [layer.attn.register_forward_pre_hook(remember) for layer in layers]
    try:
        with torch.no_grad():
            backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    return [attention_map(layer, inputs[layer.attn], (height, width), point) for layer in layers]


def draw_attention(
    image: np.ndarray, maps: Sequence[AttentionMap], point: Sequence[int], head: Optional[int] = None
) -> Figure:
    """Draws what a point of an image attends to, over the image.

    Args:
        image: (H, W, 3) in RGB, from 0 to 255.
        maps: See :func:`attention_maps`.
        point: (x, y) in pixels, the one they are of.
        head: Number of the head, from 0 on; None draws the mean of all.

    Returns:
        A figure, 1200 pixels wide.

    Raises:
        ValueError: A block has no such head.
    """
    size = image.shape[:2]
    chosen, texts = [], [('image', f'{size[0]} x {size[1]} pixels\npoint ({point[0]}, {point[1]})')]
    for x in maps:
        heads = len(x.weights)
        if head is not None and head not in range(heads):
            raise ValueError(f'the heads of block {x.block} are from 0 to {heads - 1}, got {head}')
        weights, off_map = (y.mean(0) if head is None else y[head] for y in (x.weights, x.off_map))
        chosen.append(weights)
        texts.append(describe(x, weights, off_map.item()))
    columns = min((4, 3, 5), key=lambda columns: -len(texts) % columns)  # with the fewest places left empty
    figure, axes = panels(texts, size, min(columns, len(texts)))
    axes[0].imshow(image)
    grey = 0.6 * image.mean(-1, keepdims=True).repeat(3, -1) / 255
    for axis, x, weights in zip(axes[1:], maps, chosen):
        rows, cols = (x.key_grid.nearest(side) for side in size)
        heat = (weights / weights.abs().max().clamp(min=1e-12))[rows][:, cols].numpy()
        colors = dict(cmap='bwr', vmin=-1) if is_signed(x) else dict(cmap='inferno', vmin=0)
        axis.imshow(grey)
        axis.imshow(heat, vmax=1, alpha=0.9 * np.abs(heat) ** 0.5, **colors)
        (top, bottom), (left, right) = (x.query_grid.extent(token, 1, side) for token, side in zip(x.query, size))
        outline(axis, (left, top, right, bottom), 'cyan')
        if x.window != (0, 0, size[1], size[0]):
            outline(axis, x.window, 'white')
    for axis in axes:
        axis.plot(*point, '+', color='black', markersize=11, markeredgewidth=3)
        axis.plot(*point, '+', color='cyan', markersize=10, markeredgewidth=1.5)
    return figure


def describe(x: AttentionMap, weights: Tensor, off_map: float) -> Tuple[str, str]:
    """What stands above and below the map of a head, or of the mean: which block, and the numbers."""
    low, high = weights.min().item(), weights.max().item()
    values = f'{low:.2g} to {high:.2g}' if is_signed(x) else f'up to {high:.2g}'
    outside = f', {off_map:.1%} off the map' if off_map else ''
    return (
        f'block {x.block}: {x.kind}, stride {x.query_grid.stride}',
        f'keys of stride {x.key_grid.stride}\n{values}{outside}',
    )


def is_signed(x: AttentionMap) -> bool:
    """Whether weights may be negative."""
    return x.kind.startswith('path')


class Layer(NamedTuple):
    """An attention of a backbone.

    Attributes:
        block: Number of its block, from 0 on.
        part: Stage of a pyramid, quarter of a plain backbone.
        kind: See :class:`AttentionMap`.
        attn: The module.
        queries: Where its queries lie on the image.
        keys: Where its keys do.
        window: Side of its windows in pixels, 0 if there are none.
        extra: Tokens before those of the map.
    """

    block: int
    part: int
    kind: str
    attn: nn.Module
    queries: Grid
    keys: Grid
    window: int = 0
    extra: int = 0


def attention_layers(backbone: Backbone) -> Iterator[Layer]:
    """Every attention of a backbone's blocks, in rising order."""
    if isinstance(backbone, PlainViT):
        grid = plain_grid(backbone)
        for i, block in enumerate(backbone.blocks):
            window = block.attn.window_size * grid.stride
            kind = 'window' if window else 'global'
            part = 4 * i // len(backbone.blocks)
            yield Layer(i, part, kind, block.attn, grid, grid, window, int(backbone.with_cls_token))
    elif isinstance(backbone, MViTv2):
        stride = 4
        for i, block in enumerate(backbone.blocks):
            attn = block.attn
            queries, keys = (pyramid_grid(stride * pool.stride[0]) for pool in (attn.pool_q, attn.pool_k))
            kind = 'window' if attn.window_size else 'global'
            part = sum(i >= start for start in backbone.starts[1:])
            yield Layer(i, part, kind, attn, queries, keys, attn.window_size * stride)
            stride = queries.stride
    elif isinstance(backbone, MPViT):
        block = 0
        for part, stage in enumerate(backbone.stages):
            grid = pyramid_grid(4 * 2**part)
            for parallel in zip(*(path.blocks for path in stage.paths)):
                for path, x in enumerate(parallel):
                    side = 2 * path + 3
                    yield Layer(block, part, f'path {side} x {side}', x.attn, grid, grid)
                block += 1
    elif isinstance(backbone, ScalableViT):
        block = 0
        for part, blocks in enumerate(backbone.stages):
            grid = pyramid_grid(4 * 2**part)
            for x in blocks:
                if isinstance(x.attn, WindowAttention):
                    yield Layer(block, part, 'window', x.attn, grid, grid, x.attn.window_size * grid.stride)
                else:
                    # Each key is of as many tokens side by side, the first of which begins with the map.
                    keys = Grid(grid.stride * x.attn.spatial_ratio, grid.origin)
                    yield Layer(block, part, 'scalable', x.attn, grid, keys)
                block += 1
    else:
        raise ValueError(f'the attention of {type(backbone).__name__} is not known')


def attention_map(layer: Layer, x: Tensor, image_size: Tuple[int, int], point: Sequence[int]) -> AttentionMap:
    """What an attention's query at a point attends to.

    Args:
        layer: The attention.
        x: Its input, of one image.
        image_size: (H, W) in pixels.
        point: (x, y) in pixels.
    """
    size = layer.queries.size(image_size)
    row, col = (layer.queries.nearest(side)[i].item() for side, i in zip(image_size, (point[1], point[0])))
    side = layer.window // layer.queries.stride
    if isinstance(layer.attn, FactorizedAttention):
        weights = factorized_weights(layer.attn, x, row, col)
        off_map = weights.new_zeros(len(weights))
    else:
        key_size = layer.keys.size(image_size)
        keys = places(key_size, layer.window // layer.keys.stride, layer.extra)
        window, token = (places(size, side, layer.extra) == 1 + row * size[1] + col).nonzero()[0].tolist()
        p = softmax_weights(layer.attn, x, window, token)
        weights = p.new_zeros(len(p), 1 + key_size[0] * key_size[1]).index_add_(1, keys[window], p)
        weights, off_map = weights[:, 1:].unflatten(1, key_size), weights[:, 0]
    side = side or max(size)
    top, bottom = layer.queries.extent(row // side * side, side, image_size[0])
    left, right = layer.queries.extent(col // side * side, side, image_size[1])
    window = (left, top, right, bottom)
    return AttentionMap(layer.block, layer.kind, (row, col), layer.queries, layer.keys, window, weights, off_map)


def softmax_weights(attn: nn.Module, x: Tensor, window: int, token: int) -> Tensor:
    """(heads, N), what a token of a window gives to the keys of the window.

    Args:
        attn: Attention that calls PyTorch's.
        x: Its input.
        window: Number among the windows.
        token: Number in the window.
    """
    # With a gradient, relative positions are part of queries and keys, and there is one call for all windows.
    with torch.enable_grad(), Watching() as watching:
        attn(x.detach().requires_grad_())
    ((q, k, mask, scale),) = watching.calls
    scores = scale * (q[window, :, token, None] @ k[window].transpose(1, 2))[:, 0]  # (heads, N)
    if mask is not None:
        scores = scores.masked_fill(~mask[window, 0], -torch.inf)
    return scores.detach().softmax(-1).cpu()


class Watching(TorchFunctionMode):
    """Keeps the queries, keys, mask and scale of every call of PyTorch's attention under it."""

    def __init__(self):
        super().__init__()
        self.calls: list = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k, _, mask = args
            self.calls.append((q, k, mask, kwargs['scale']))
        return func(*args, **(kwargs or {}))


def factorized_weights(attn: nn.Module, x: Tensor, row: int, col: int) -> Tensor:
    """(heads, H, W), what a token gives to the values of MPViT's attention; ``x`` is (1, H, W, C)."""
    with torch.no_grad():
        q, k, _ = (y[0].unflatten(-1, (NUM_HEADS, -1)) for y in split_linear(attn.qkv, x, 3))  # (H, W, heads, C')
        k = k.flatten(0, 1).softmax(0).view_as(k)
        return attn.scale * torch.einsum('nc,hwnc->nhw', q[row, col], k).cpu()


def places(size: Tuple[int, int], window: int, extra: int) -> Tensor:
    """(windows, N), which place of a map each token of each window is, in rows from 1 on; 0 is none.

    Args:
        size: Rows and columns of the map.
        window: Side of the windows in tokens; 0 has one for all.
        extra: Tokens before those of the map.
    """
    numbers = torch.arange(1, 1 + size[0] * size[1]).view(1, *size, 1)
    if window:
        return partition_windows(numbers, window).flatten(1)
    return F.pad(numbers.flatten(1), (extra, 0))
