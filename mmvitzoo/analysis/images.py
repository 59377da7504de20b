"""Images for a backbone, and figures of what it makes of them."""

from typing import Any, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

WIDTH = 12  # of figures, in inches of 100 pixels
TEXT = 0.75  # height of a line above a picture and two below it, in inches


def normalize(image: np.ndarray, data_preprocessor: Mapping[str, Any]) -> Tensor:
    """What a model's data_preprocessor makes of an image, without padding.

    Args:
        image: (H, W, 3) in RGB, from 0 to 255.
        data_preprocessor: The config of MMDetection's, MMSegmentation's or MMPretrain's.

    Returns:
        (1, 3, H, W).
    """
    if not (data_preprocessor.get('bgr_to_rgb') or data_preprocessor.get('to_rgb')):
        image = image[..., ::-1]  # the toolboxes read images in BGR
    mean, std = (torch.tensor(data_preprocessor.get(key) or [x] * 3).float() for key, x in (('mean', 0), ('std', 1)))
    return ((torch.from_numpy(image.copy()).float() - mean) / std).permute(2, 0, 1)[None].contiguous()


def panels(texts: Sequence[Tuple[str, str]], size: Sequence[int], columns: int) -> Tuple[Figure, List[Axes]]:
    """An empty figure for pictures of one size, 1200 pixels wide, or 600 for a single picture.

    Args:
        texts: For each picture what stands above it and what stands below it.
        size: (H, W) of the pictures.
        columns: Pictures in a row.

    Returns:
        The figure and, for each picture, where it is drawn.
    """
    rows = -(-len(texts) // columns)
    width = WIDTH / max(columns, 2)
    height = width * size[0] / size[1] + TEXT
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


def outline(axis: Axes, box: Sequence[float], color: str) -> None:
    """Draws a box over a picture.

    Args:
        axis: Where the picture is drawn.
        box: Left, upper, right and lower border, in pixels from the left and upper border of the picture.
        color: Of Matplotlib.
    """
    left, top, right, bottom = box
    corner = (left - 0.5, top - 0.5)  # pictures are drawn with the centre of their first pixel at 0
    axis.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=color, linewidth=1))
