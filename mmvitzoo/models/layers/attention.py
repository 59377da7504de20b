"""Softmax attention with decomposed relative positions, whose memory is linear in the tokens.

Relative positions are those of MViTv2 (https://arxiv.org/abs/2112.01526): a query q_i scores a key
in row r and column c of the key map with ``q_i . k_j * scale + rows[i, r] + cols[i, c]``, where the
two terms are products of q_i with learned tables, one per axis.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .windows import merge_windows, partition_windows

# Elements of a relative position bias that exist at one time, 64 MiB of float32.
BIAS_ELEMENTS = 2**24


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Optional[Tensor] = None, cols: Optional[Tensor] = None) -> Tensor:
    """``softmax(q k^T * C**-0.5 + bias) v`` without a score matrix.

    Args:
        q: (B, heads, N, C).
        k: (B, heads, H * W, C), a map in row-major order.
        v: (B, heads, H * W, C).
        rows: (B, heads, N, H), what a query adds to the scores of the keys in each row.
        cols: (B, heads, N, W), the same for columns. Given with ``rows`` or not at all.

    Returns:
        (B, heads, N, C).
    """
    if rows is None or cols is None:
        return F.scaled_dot_product_attention(q, k, v)
    # A bias that needs a gradient has no fused kernel, a GPU's memory is better spent otherwise,
    # and a number of slices that depends on the image would be compiled into a program.
    if (torch.is_grad_enabled() and rows.requires_grad) or q.is_cuda or torch.compiler.is_compiling():
        return attend_extended(q, k, v, rows, cols)
    return attend_biased(q, k, v, rows, cols)


def attend_extended(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """:func:`attend` as one dot product: q continues with its terms, k with its one-hot place."""
    channels, scale = q.shape[-1], q.shape[-1] ** -0.5
    height, width = rows.shape[-1], cols.shape[-1]
    row = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
    col = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
    place = torch.cat([row, col], -1).expand(*k.shape[:2], -1, -1)
    q = torch.cat([q, rows / scale, cols / scale], -1)
    # Fused kernels want values as wide as the keys.
    v = F.pad(v, (0, height + width))
    return F.scaled_dot_product_attention(q, torch.cat([k, place], -1), v, scale=scale)[..., :channels]


def attend_biased(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """:func:`attend` with the bias made for as many queries at a time as :data:`BIAS_ELEMENTS` allows."""
    batch, heads, queries, _ = q.shape
    step = max(BIAS_ELEMENTS // (batch * heads * k.shape[2]), 1)
    outs = []
    for start in range(0, queries, step):
        part = slice(start, start + step)
        bias = (rows[:, :, part, :, None] + cols[:, :, part, None, :]).flatten(-2)
        outs.append(F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=bias))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def relative_table(table: Tensor, size: int) -> Tensor:
    """Entries of a table of relative positions for every query and key of an axis.

    Args:
        table: (L, C); entry (L - 1) / 2 is for a query at the place of its key.
        size: Queries and keys along the axis. Tables of another length than ``2 * size - 1`` are
            interpolated linearly.

    Returns:
        (size, size, C); [i, j] is for query i and key j.
    """
    if len(table) != 2 * size - 1:
        table = resize_table(table, 2 * size - 1)
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


def resize_table(table: Tensor, length: int) -> Tensor:
    """(L, C) -> (length, C), linearly."""
    return F.interpolate(table.float().T[None], length, mode='linear')[0].T.to(table.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over a map, in windows or whole, or over a sequence.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        window_size: Side of the square windows, in tokens; 0 attends to all. Maps that it does not
            divide are padded with zeros, which attend and are attended to.
        rel_pos_size: Rows and columns for which tables of relative positions are learned; None has
            no relative positions. Maps of other sizes interpolate the tables.
        rel_pos_scaled: Multiply the tables with the query after its scaling by
            ``(dim / num_heads)**-0.5`` as the ViTAE authors' ViTDet does, not before it as
            Detectron2, Segment Anything and Hugging Face do.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 0,
        rel_pos_size: Optional[Tuple[int, int]] = None,
        rel_pos_scaled: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_scale = (dim // num_heads) ** -0.5 if rel_pos_scaled else 1.0
        if rel_pos_size is None:
            self.rel_pos_h = self.rel_pos_w = None
        else:
            height, width = rel_pos_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), or (B, N, C) -> (B, N, C) without windows and positions."""
        size = x.shape[1:-1]
        if self.window_size:
            x = partition_windows(x, self.window_size)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, ..., 3, heads, C)
        q, k, v = qkv.flatten(1, -4).permute(2, 0, 3, 1, 4)
        rows = cols = None
        if self.rel_pos_h is not None:
            height, width = x.shape[1:3]
            places = q.unflatten(2, (height, width))
            table_h = relative_table(self.rel_pos_scale * self.rel_pos_h, height)
            table_w = relative_table(self.rel_pos_scale * self.rel_pos_w, width)
            rows = torch.einsum('bnhwc,hkc->bnhwk', places, table_h).flatten(2, 3)
            cols = torch.einsum('bnhwc,wkc->bnhwk', places, table_w).flatten(2, 3)
        x = attend(q, k, v, rows, cols).transpose(1, 2).reshape(x.shape)
        if self.window_size:
            x = merge_windows(x, size)
        return self.proj(x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ('rel_pos_h', 'rel_pos_w'):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and given is not None and given.dim() == 2 and len(given) != len(own):
                state_dict[prefix + name] = resize_table(given, len(own))
        super()._load_from_state_dict(state_dict, prefix, *args)
