"""Input images of backbones, and figures."""

from typing import Any, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

FIGURE_WIDTH = 12  # in inches of 100 pixels
TEXT_HEIGHT = 0.75  # of one line above a panel and two lines below it, in inches


def normalize(image: np.ndarray, data_preprocessor: Mapping[str, Any]) -> Tensor:
    """Normalizes an image as a model's ``data_preprocessor`` does, without padding.

    Args:
        image: (H, W, 3) in RGB, from 0 to 255.
        data_preprocessor: Config of the ``data_preprocessor`` of MMDetection, MMSegmentation or MMPretrain.

    Returns:
        (1, 3, H, W).

    Raises:
        ValueError: The model is for images of other channels.
    """
    if not (data_preprocessor.get('bgr_to_rgb') or data_preprocessor.get('to_rgb')):
        image = image[..., ::-1]  # the toolboxes read images in BGR
    mean, std = (torch.tensor(data_preprocessor.get(key) or [x] * 3).float() for key, x in (('mean', 0), ('std', 1)))
    if len(mean) != 3:
        raise ValueError(f'only models for images of 3 channels are supported, the data_preprocessor has {len(mean)}')
    return ((torch.from_numpy(image.copy()).float() - mean) / std).permute(2, 0, 1)[None].contiguous()


def panels(texts: Sequence[Tuple[str, str]], size: Sequence[int], columns: int) -> Tuple[Figure, List[Axes]]:
    """Creates a figure of empty panels, 1200 pixels wide, or 600 with a single column.

    Args:
        texts: Title of each panel and the text below it.
        size: (H, W) of the images in the panels.
        columns: Number of panels in a row.

    Returns:
        The figure and the axes of each panel.
    """
    rows = -(-len(texts) // columns)
    width = FIGURE_WIDTH / max(columns, 2)
    height = width * size[0] / size[1] + TEXT_HEIGHT
    figure = Figure((columns * width, rows * height), dpi=100, layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(texts) :]:
        axis.axis('off')
    for axis, (title, label) in zip(axes, texts):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=10, fontweight='bold')
        axis.set_xlabel(label, fontsize=9)
    return figure, axes[: len(texts)]


def draw_box(axis: Axes, box: Sequence[float], color: str) -> None:
    """Draws a box over an image.

    Args:
        axis: Axes of the image.
        box: Left, top, right and bottom border, in pixels from the left and top border of the image.
        color: Color of Matplotlib.
    """
    left, top, right, bottom = box
    corner = (left - 0.5, top - 0.5)  # the center of an image's first pixel is at 0
    axis.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=color, linewidth=1))
