r"""Decomposed relative positions of MViTv2 (https://arxiv.org/abs/2112.01526) that fit a flash kernel.

Query i at row y_i and column x_i scores key j at row y_j and column x_j with

    s_ij = q_i . k_j / sqrt(C) + q_i . R_h[y_i - y_j] + q_i . R_w[x_i - x_j]

The usual implementation adds an N x N bias per head to the scores, so no flash kernel applies and memory is
quadratic. But the two terms depend on the row and on the column of the key alone. With

    h_i[y] = q_i . R_h[y_i - y]    (H numbers per query)
    w_i[x] = q_i . R_w[x_i - x]    (W numbers per query)

and one-hot vectors e_y in R^H and e_x in R^W, the score is a single dot product of longer vectors:

    s_ij = [q_i, h_i * sqrt(C), w_i * sqrt(C)] . [k_j, e_{y_j}, e_{x_j}] / sqrt(C)

Concatenating these to q and k leaves plain softmax attention, and gradients reach the tables through h and w. With
values padded to the same C + H + W channels, flash kernels apply, and memory is N (C + H + W) per head instead of N^2.
CUDA's takes up to 256 channels, such as H = W = 96 beside C = 64. Beyond that, PyTorch chooses another kernel.
"""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiling import statically_true
from .dtypes import at_least_float32


def get_rel_pos(q_size: int, k_size: int, table: Tensor) -> Tensor:
    """Looks up the relative positions of every query and key along one axis.

    Args:
        q_size: Number of queries along the axis.
        k_size: Number of keys along the axis. If the numbers differ, the coordinates of the coarser axis are
            multiplied by their ratio, so that both count in steps of the finer.
        table: Table of (L, C), indexed by query minus key coordinate plus ``(k_size - 1) * max(q_size / k_size, 1)``.
            Tables of another length than ``2 * max(q_size, k_size) - 1`` are interpolated linearly.

    Returns:
        (q_size, k_size, C).
    """
    size = max(q_size, k_size)
    length = 2 * size - 1
    if not statically_true(table.shape[0] == length):
        table = resize_rel_pos(table, length)
    # The dtype and truncation of Detectron2's `get_rel_pos`, so that fractional ratios pick the same entry. The ratios
    # are divisions of integers, which ONNX rounds alike; the offset is (k_size - 1) * max(q_size / k_size, 1).
    q_coords = torch.arange(q_size, device=table.device)[:, None] * (size / q_size)
    k_coords = torch.arange(k_size, device=table.device) * (size / k_size)
    offset = (k_size - 1) * size / k_size
    return table[(q_coords - k_coords + offset).long()]  # indices of (q_size, k_size)


def resize_rel_pos(table: Tensor, length: int) -> Tensor:
    """(L, C) -> (length, C) by linear interpolation."""
    return F.interpolate(at_least_float32(table).T[None], length, mode='linear')[0].T.to(table.dtype)


def rel_pos_scores(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tuple[Tensor, Tensor]:
    """Computes h and w of the module's docstring: scores of the rows and of the columns of the keys.

    Args:
        q: (B, heads, Hq, Wq, C).
        rel_h: (Hq, H, C), see :func:`get_rel_pos`.
        rel_w: (Wq, W, C).

    Returns:
        (B, heads, Hq, Wq, H) and (B, heads, Hq, Wq, W).
    """
    return torch.einsum('bnhwc,hkc->bnhwk', q, rel_h), torch.einsum('bnhwc,wkc->bnhwk', q, rel_w)


def concat_rel_pos(q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tuple[Tensor, Tensor, float]:
    """Concatenates the relative scores to q and one-hot positions to k.

    One dot product, multiplied by the scale, then gives ``q.k * C**-0.5 + h[row] + w[col]``.

    Args:
        q: (B, heads, Hq * Wq, C), tokens of a map in row-major order.
        k: (B, heads, H * W, C).
        rel_h: (Hq, H, C), see :func:`get_rel_pos`.
        rel_w: (Wq, W, C).

    Returns:
        (B, heads, Hq * Wq, C + H + W), (B, heads, H * W, C + H + W), and the scale, ``C**-0.5`` of the original width.
    """
    scale = q.shape[-1] ** -0.5
    height, width = rel_h.shape[1], rel_w.shape[1]
    one_hot_row = torch.eye(height, device=k.device)[:, None].expand(-1, width, -1)
    one_hot_col = torch.eye(width, device=k.device).expand(height, -1, -1)
    one_hot = torch.cat([one_hot_row, one_hot_col], -1).flatten(0, 1).to(k.dtype).expand(*k.shape[:2], -1, -1)
    h, w = rel_pos_scores(q.unflatten(2, (rel_h.shape[0], rel_w.shape[0])), rel_h, rel_w)
    q = torch.cat([q, h.flatten(2, 3) / scale, w.flatten(2, 3) / scale], -1)
    return q, torch.cat([k, one_hot], -1), scale
