"""Effective receptive fields of a backbone's maps (Luo et al., NeurIPS 2016, https://arxiv.org/abs/1701.04128).

The receptive field of the token at the center of a map is the gradient of the sum of its channels with respect to the
image. Absolute values are summed over colors and averaged over images. Here the channels have random signs: after a
LayerNorm whose weights are equal, as in a new model, their plain sum is constant.
"""

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from .grid import Grid, get_backbone, output_grids, output_names
from .images import draw_box, panels

# Color of the square that holds each share of a field.
SQUARES = {0.5: 'cyan', 0.95: 'white'}
MIN_GRADIENT = 1e-4  # drawn in black, relative to the largest gradient


@dataclass
class ReceptiveField:
    """Receptive field of the token at the center of a map.

    Attributes:
        name: Name of the map, such as ``'stage 0'``, or ``'block 5'`` of a plain backbone, as in ``out_indices``.
        grid: Grid of the tokens on the image.
        center: Center of the token, (x, y) in pixels from the left and top border of the image.
        field: (H, W), the share of each pixel; the sum is 1.
    """

    name: str
    grid: Grid
    center: Tuple[float, float]
    field: Tensor

    def side(self, share: float) -> int:
        """Returns the side in pixels of the smallest square around the center that holds this share of the field.

        The side includes parts of the square that are outside the image.
        """
        y, x = ((torch.arange(n) + 0.5 - c).abs() for n, c in zip(self.field.shape, self.center[::-1]))
        # A square reaches a pixel if half its side is the larger of the two distances.
        distance, order = torch.maximum(y[:, None], x).flatten().sort(stable=True)
        cumulative = self.field.flatten()[order].double().cumsum(0)
        return round(2 * distance[(cumulative < share * cumulative[-1]).sum()].item() + 1)


def receptive_fields(model: nn.Module, images: Tensor) -> List[ReceptiveField]:
    """Computes the effective receptive fields of a backbone's maps.

    Args:
        model: Backbone of this package, or a model with one as ``backbone``, in eval mode.
        images: (N, 3, H, W), normalized, on the device of the model.

    Returns:
        One for each map that the backbone returns.

    Raises:
        ValueError: The backbone is not from this package, or does not accept the images.
    """
    backbone = get_backbone(model)
    grids = output_grids(backbone)
    generator = torch.Generator().manual_seed(0)
    fields = [torch.zeros(images.shape[2:]) for _ in grids]
    for image in images:
        image = image[None].requires_grad_()
        outs = backbone(image)
        for field, out in zip(fields, outs):
            token = out[0, :, out.shape[2] // 2, out.shape[3] // 2]
            signs = torch.randint(2, token.shape, generator=generator).to(token) * 2 - 1
            (gradient,) = torch.autograd.grad(signs @ token, image, retain_graph=True)
            field += gradient[0].abs().sum(0).cpu()
    size = images.shape[2:]
    centers = [tuple(grid.center(grid.size(size)[axis] // 2, axis) for axis in (1, 0)) for grid in grids]
    return [
        ReceptiveField(name, grid, center, field / field.sum())
        for name, grid, center, field in zip(output_names(backbone), grids, centers, fields)
    ]


def draw_receptive_fields(fields: Sequence[ReceptiveField]) -> Figure:
    """Draws receptive fields, with the squares that hold 50% and 95% of each.

    Args:
        fields: Result of :func:`receptive_fields`.

    Returns:
        A figure 1200 pixels wide, or 600 for a single map.
    """
    texts = [
        (f'{x.name}, stride {x.grid}', '\n'.join(f'{share:.0%} within {x.side(share)} pixels' for share in SQUARES))
        for x in fields
    ]
    figure, axes = panels(texts, fields[0].field.shape, columns=min(len(texts), 4))
    norm = LogNorm(MIN_GRADIENT, 1)
    for axis, x in zip(axes, fields):
        picture = axis.imshow((x.field / x.field.max()).clamp(min=MIN_GRADIENT), cmap='inferno', norm=norm)
        for share, color in SQUARES.items():
            side = x.side(share)
            left, top = (c - side / 2 for c in x.center)
            draw_box(axis, (left, top, left + side, top + side), color)
    figure.colorbar(picture, ax=axes, label='gradient, relative to the largest', fraction=0.03)
    return figure
