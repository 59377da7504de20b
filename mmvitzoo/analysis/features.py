"""Feature maps of a backbone in colors: their first three principal components as red, green and blue.

Tokens of similar features have similar colors. Each map has components of its own, so that colors of different maps
cannot be compared.
"""

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .grid import Grid, get_backbone, output_grids, output_names
from .images import panels

# Share of the tokens that each end of the color range clips, for each component.
CLIPPED_SHARE = 0.02


@dataclass
class FeatureMap:
    """Feature map in colors.

    Attributes:
        name: Name of the map, such as ``'stage 0'``, or ``'block 5'`` of a plain backbone, as in ``out_indices``.
        grid: Grid of the tokens on the image.
        channels: Number of channels of the map.
        explained_variance: Share of the map's variance in the three components, from 0 to 1.
        rgb: (H', W', 3), from 0 to 1.
    """

    name: str
    grid: Grid
    channels: int
    explained_variance: float
    rgb: np.ndarray


def feature_maps(model: nn.Module, image: Tensor) -> List[FeatureMap]:
    """Computes the feature maps of an image in colors.

    Args:
        model: Backbone of this package, or a model with one as ``backbone``, in eval mode.
        image: (1, 3, H, W), normalized, on the device of the model.

    Returns:
        One for each map that the backbone returns.

    Raises:
        ValueError: The backbone is not from this package, or does not accept the image.
    """
    backbone = get_backbone(model)
    with torch.no_grad():
        outs = backbone(image)
    return [
        FeatureMap(name, grid, out.shape[1], *pca_colors(out[0]))
        for name, grid, out in zip(output_names(backbone), output_grids(backbone), outs)
    ]


def pca_colors(x: Tensor) -> Tuple[float, np.ndarray]:
    """Projects the tokens of a map to their principal components, as colors.

    Args:
        x: (C, H, W) with C of at least 3.

    Returns:
        The share of the variance in the three components, and (H, W, 3) from 0 to 1. Each component is scaled from
        its 2nd to its 98th percentile; its sign makes its largest weight positive.
    """
    tokens = x.detach().cpu().double().flatten(1).T
    tokens = tokens - tokens.mean(0)
    variances, components = torch.linalg.eigh(tokens.T @ tokens)  # in increasing order
    components = components[:, -3:].flip(1)
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    tokens = tokens @ (components * largest.sign())
    low, high = tokens.quantile(CLIPPED_SHARE, 0), tokens.quantile(1 - CLIPPED_SHARE, 0)
    # The clamps serve maps without variance, such as those of one token.
    rgb = ((tokens - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    explained_variance = variances[-3:].sum() / variances.sum().clamp(min=1e-9)
    return explained_variance.item(), rgb.unflatten(0, x.shape[1:]).float().numpy()


def draw_features(image: np.ndarray, maps: Sequence[FeatureMap]) -> Figure:
    """Draws an image and its feature maps.

    Args:
        image: (H, W, 3) in RGB, from 0 to 255.
        maps: Result of :func:`feature_maps`.

    Returns:
        A figure 1200 pixels wide.
    """
    size = image.shape[:2]
    texts = [('image', f'{size[0]} x {size[1]} pixels')]
    for x in maps:
        tokens = f'{x.rgb.shape[0]} x {x.rgb.shape[1]} tokens, {x.channels} channels'
        texts.append((f'{x.name}, stride {x.grid}', f'{tokens}\n{x.explained_variance:.0%} of the variance'))
    figure, axes = panels(texts, size, columns=min(len(texts), 5))
    axes[0].imshow(image)
    for panel, x in zip(axes[1:], maps):
        rows, cols = (x.grid.nearest(size[axis], axis) for axis in (0, 1))
        panel.imshow(x.rgb[rows][:, cols], interpolation='nearest')
    return figure
