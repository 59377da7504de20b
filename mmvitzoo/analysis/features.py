"""What the maps of a backbone tell apart: their first three principal components as red, green and blue.

Tokens of one colour are alike to the backbone. The components, and so the colours, are those of one map:
they do not compare with the colours of another.
"""

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .grid import Grid, backbone_of, output_grids, output_names
from .images import panels

# Shares of the tokens, for each component, that may lie outside of the range of colours at either end.
CUT_OFF = 0.02


@dataclass
class FeatureMap:
    """A map of a backbone in colours.

    Attributes:
        name: What it is of, such as ``'stage 0'``, or ``'block 5'`` of a plain backbone, as in ``out_indices``.
        grid: Where its tokens lie on the image.
        channels: Channels of the map.
        explained: Share of the map's variance that the colours show, from 0 to 1.
        rgb: (H', W', 3), from 0 to 1.
    """

    name: str
    grid: Grid
    channels: int
    explained: float
    rgb: np.ndarray


def feature_maps(model: nn.Module, image: Tensor) -> List[FeatureMap]:
    """The maps that a backbone makes of an image, in colours.

    Args:
        model: A backbone of this package, or a model that has one as ``backbone``, in eval mode.
        image: (1, 3, H, W), normalised, on the model's device.

    Returns:
        One for each map that the backbone returns.

    Raises:
        ValueError: The backbone is of another package, or does not take the image.
    """
    backbone = backbone_of(model)
    with torch.no_grad():
        outs = backbone(image)
    return [
        FeatureMap(name, grid, out.shape[1], *colour(out[0]))
        for name, grid, out in zip(output_names(backbone), output_grids(backbone), outs)
    ]


def colour(x: Tensor) -> Tuple[float, np.ndarray]:
    """Principal components of the tokens of a map, as colours.

    Args:
        x: (C, H, W), C of at least 3.

    Returns:
        The share of the variance that the three components have, and (H, W, 3) from 0 to 1: each component
        from its 2nd to its 98th percentile, its sign such that its largest weight is positive.
    """
    tokens = x.detach().cpu().double().flatten(1).T
    tokens = tokens - tokens.mean(0)
    variances, components = torch.linalg.eigh(tokens.T @ tokens)  # in rising order
    components = components[:, -3:].flip(1)
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    tokens = tokens @ (components * largest.sign())
    low, high = tokens.quantile(CUT_OFF, 0), tokens.quantile(1 - CUT_OFF, 0)
    # A map of one colour has no range.
    rgb = ((tokens - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    explained = variances[-3:].sum() / variances.sum().clamp(min=1e-9)
    return explained.item(), rgb.unflatten(0, x.shape[1:]).float().numpy()


def draw_features(image: np.ndarray, maps: Sequence[FeatureMap]) -> Figure:
    """Draws an image and the maps that a backbone makes of it.

    Args:
        image: (H, W, 3) in RGB, from 0 to 255.
        maps: See :func:`feature_maps`.

    Returns:
        A figure, 1200 pixels wide.
    """
    size = image.shape[:2]
    texts = [('image', f'{size[0]} x {size[1]} pixels')]
    for x in maps:
        tokens = f'{x.rgb.shape[0]} x {x.rgb.shape[1]} tokens, {x.channels} channels'
        texts.append((f'{x.name}, stride {x.grid.stride}', f'{tokens}\n{x.explained:.0%} of the variance'))
    figure, axes = panels(texts, size, columns=min(len(texts), 5))
    axes[0].imshow(image)
    for axis, x in zip(axes[1:], maps):
        rows, cols = (x.grid.nearest(side) for side in size)
        axis.imshow(x.rgb[rows][:, cols], interpolation='nearest')
    return figure
