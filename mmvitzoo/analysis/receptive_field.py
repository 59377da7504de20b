"""How far a backbone's maps see: effective receptive fields.

Luo et al., NeurIPS 2016, https://arxiv.org/abs/1701.04128: what the token at the centre of a map depends on
is the gradient of its channels' sum with respect to the image, its absolute value added over colours and
averaged over images. Here the channels have random signs: after a LayerNorm their plain sum is a
constant as long as its weights are alike, as they are in a new model.
"""

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from .grid import backbone_of, output_grids, output_names
from .images import outline, panels

# Shares of a field that squares are drawn for, and how.
SQUARES = {0.5: 'cyan', 0.95: 'white'}
FAINTEST = 1e-4  # of the largest gradient, what is drawn in black


@dataclass
class ReceptiveField:
    """What the token at the centre of a map depends on.

    Attributes:
        name: What the map is of, such as ``'stage 0'``, or ``'block 5'`` of a plain backbone, as in ``out_indices``.
        stride: Pixels between neighbouring tokens.
        center: Centre of the token, (x, y) in pixels from the left and upper border of the image.
        field: (H, W), the share of each pixel; the sum is 1.
    """

    name: str
    stride: int
    center: Tuple[float, float]
    field: Tensor

    def side(self, share: float) -> int:
        """Side in pixels of the smallest square around the centre that holds this share of the field.

        What of the square is outside of the image counts as part of its side.
        """
        distances = [(torch.arange(n) + 0.5 - at).abs() for n, at in zip(self.field.shape, self.center[::-1])]
        # A square reaches a pixel with the larger of its two distances.
        distance, order = torch.maximum(distances[0][:, None], distances[1]).flatten().sort(stable=True)
        held = self.field.flatten()[order].double().cumsum(0)
        return round(2 * distance[(held < share * held[-1]).sum()].item() + 1)


def receptive_fields(model: nn.Module, images: Tensor) -> List[ReceptiveField]:
    """Effective receptive fields of a backbone's maps.

    Args:
        model: A backbone of this package, or a model that has one as ``backbone``, in eval mode.
        images: (N, 3, H, W), normalised, on the model's device.

    Returns:
        One for each map that the backbone returns.

    Raises:
        ValueError: The backbone is of another package, or does not take the images.
    """
    backbone = backbone_of(model)
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
    centers = [tuple(grid.center(n // 2) for n in grid.size(size)[::-1]) for grid in grids]
    return [
        ReceptiveField(name, grid.stride, center, field / field.sum())
        for name, grid, center, field in zip(output_names(backbone), grids, centers, fields)
    ]


def draw_receptive_fields(fields: Sequence[ReceptiveField]) -> Figure:
    """Draws the receptive fields of a backbone's maps, with the squares that hold half and 95% of each.

    Args:
        fields: See :func:`receptive_fields`.

    Returns:
        A figure, 1200 pixels wide, or 600 for a single map.
    """
    texts = [
        (f'{x.name}, stride {x.stride}', '\n'.join(f'{share:.0%} within {x.side(share)} pixels' for share in SQUARES))
        for x in fields
    ]
    figure, axes = panels(texts, fields[0].field.shape, columns=min(len(texts), 4))
    for axis, x in zip(axes, fields):
        picture = axis.imshow((x.field / x.field.max()).clamp(min=FAINTEST), cmap='inferno', norm=LogNorm(FAINTEST, 1))
        for share, color in SQUARES.items():
            half = x.side(share) / 2
            left, top = (at - half for at in x.center)
            outline(axis, (left, top, left + 2 * half, top + 2 * half), color)
    figure.colorbar(picture, ax=axes, label='gradient, of the largest', fraction=0.03)
    return figure
