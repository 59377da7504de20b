"""Softmax attention with decomposed relative positions, whose memory is linear in the tokens.

Relative positions are those of MViTv2 (https://arxiv.org/abs/2112.01526): query i scores key j with
``q_i . k_j * scale + q_i . R_h[i, j] + q_i . R_w[i, j]``. R_h depends on the rows of i and j alone,
R_w on their columns, so that the two terms are one number per row of keys and one per column.
"""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from .compiling import is_compiling, known
from .linear import Linear, split_linear
from .windows import merge_windows, partition_windows

# Elements of a relative position bias that exist at one time: few enough to stay near the processor.
BIAS_ELEMENTS = 2**22


def attend(
    q: Tensor, k: Tensor, v: Tensor, table_h: Optional[Tensor] = None, table_w: Optional[Tensor] = None
) -> Tensor:
    """``softmax(q k^T * C**-0.5 + relative positions) v`` without a score matrix.

    Tokens are those of maps in row-major order.

    Args:
        q: (B, heads, Hq * Wq, C).
        k: (B, heads, H * W, C).
        v: (B, heads, H * W, C).
        table_h: (Hq, H, C), what a query multiplies to score the rows of keys; see
            :func:`relative_table`. None has no relative positions.
        table_w: (Wq, W, C), the same for columns.

    Returns:
        (B, heads, Hq * Wq, C).
    """
    if table_h is None or table_w is None:
        return attend_plain(q, k, v)
    # A bias that needs a gradient has no fused kernel, a GPU's memory is better spent otherwise,
    # and a number of slices that depends on the image would be compiled into a program.
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or table_h.requires_grad)
    if needs_grad or q.is_cuda or is_compiling():
        return attend_extended(q, k, v, table_h, table_w)
    return attend_biased(q, k, v, table_h, table_w)


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor] = None, scale: Optional[float] = None
) -> Tensor:
    """``softmax(q k^T * scale) v`` (https://arxiv.org/abs/1706.03762) without a score matrix.

    Args:
        q: (B, heads, Nq, C).
        k: (B, heads, N, C).
        v: (B, heads, N, Cv).
        mask: (B, 1, 1, N), True where a key is attended to, for each query at least one; None
            attends to all.
        scale: Factor of the scores; None is ``C**-0.5``.

    Returns:
        (B, heads, Nq, Cv).
    """
    width, value_width = q.shape[-1], v.shape[-1]
    scale = width**-0.5 if scale is None else scale
    # Fused kernels want values as wide as queries and keys. Where there are no data there are no kernels.
    if q.device.type == 'meta':
        pass
    elif value_width < width:
        v = F.pad(v, (0, width - value_width))
    elif value_width > width:
        q, k = (F.pad(y, (0, value_width - width)) for y in (q, k))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[..., :value_width]


def attend_extended(q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
    """:func:`attend`, of the same shapes, as one dot product: q continues with its terms, k with its one-hot place."""
    scale = q.shape[-1] ** -0.5
    height, width = table_h.shape[1], table_w.shape[1]
    row = torch.eye(height, device=k.device)[:, None].expand(-1, width, -1)
    col = torch.eye(width, device=k.device).expand(height, -1, -1)
    place = torch.cat([row, col], -1).flatten(0, 1).to(k.dtype).expand(*k.shape[:2], -1, -1)
    rows, cols = relative_scores(q.unflatten(2, (table_h.shape[0], table_w.shape[0])), table_h, table_w)
    q = torch.cat([q, rows.flatten(2, 3) / scale, cols.flatten(2, 3) / scale], -1)
    return attend_plain(q, torch.cat([k, place], -1), v, scale=scale)


def attend_biased(q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
    """:func:`attend`, of the same shapes, with a bias: of one head, :data:`BIAS_ELEMENTS` at a time."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    places = q.unflatten(2, (table_h.shape[0], table_w.shape[0]))
    out = torch.empty_like(places)
    images = max(BIAS_ELEMENTS // (queries * keys), 1)
    lines = max(BIAS_ELEMENTS // (len(table_w) * keys), 1)
    bias = q.new_empty(0)
    for i in range(0, batch, images):
        for head in range(heads):
            at = (slice(i, i + images), slice(head, head + 1))
            for start in range(0, len(table_h), lines):
                some = slice(start, start + lines)
                part = places[(*at, some)]
                rows, cols = relative_scores(part, table_h[some], table_w)
                if bias.shape[:-1] != rows.shape:  # else the memory of the part before
                    bias = rows.new_empty(*rows.shape, cols.shape[-1])
                torch.add(rows[..., None], cols[..., None, :], out=bias)
                mask = bias.flatten(-2).flatten(2, 3)
                result = F.scaled_dot_product_attention(part.flatten(2, 3), k[at], v[at], attn_mask=mask)
                out[(*at, some)] = result.view(part.shape)
    return out.flatten(2, 3)


def relative_scores(q: Tensor, table_h: Tensor, table_w: Tensor) -> Tuple[Tensor, Tensor]:
    """What queries add to the scores of each row and each column of keys.

    Args:
        q: (B, heads, Hq, Wq, C).
        table_h: (Hq, H, C).
        table_w: (Wq, W, C).

    Returns:
        (B, heads, Hq, Wq, H) and (B, heads, Hq, Wq, W).
    """
    return torch.einsum('bnhwc,hkc->bnhwk', q, table_h), torch.einsum('bnhwc,wkc->bnhwk', q, table_w)


def relative_table(table: Tensor, queries: int, keys: int) -> Tensor:
    """Entries of a table of relative positions for every query and key of an axis.

    Args:
        table: (L, C); entry (L - 1) / 2 is for a query at the place of its key. Tables of another
            length than ``2 * max(queries, keys) - 1`` are interpolated linearly.
        queries: Their number along the axis.
        keys: Their number along the axis. Where it is another, the fewer spread over the same range.

    Returns:
        (queries, keys, C).
    """
    longer = max(queries, keys)
    length = 2 * longer - 1
    if not known(table.shape[0] == length):
        table = resize_table(table, length)
    place_of_query = torch.arange(queries, device=table.device)[:, None] * (longer / queries)
    place_of_key = torch.arange(keys, device=table.device) * (longer / keys)
    # In this order, in float32 and cut off, not rounded: the originals' entry where the steps are fractions. One
    # division of whole numbers for each factor is the same in float32, in which ONNX computes them.
    return table[(place_of_query - place_of_key + (keys - 1) * longer / keys).long()]


def resize_table(table: Tensor, length: int) -> Tensor:
    """(L, C) -> (length, C), linearly."""
    return F.interpolate(table.float().T[None], length, mode='linear')[0].T.to(table.dtype)


class RelativeAttention(nn.Module):
    """An attention's tables of relative positions.

    Args:
        head_dim: Channels of a head.
        rel_pos_size: Rows and columns for which tables are learned, of queries or keys, whichever
            are more; None has no relative positions. Maps of other sizes interpolate the tables,
            and so does loading a checkpoint with tables of other sizes.
    """

    def __init__(self, head_dim: int, rel_pos_size: Optional[Tuple[int, int]]):
        super().__init__()
        if rel_pos_size is None:
            self.rel_pos_h = self.rel_pos_w = None
        else:
            height, width = rel_pos_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, head_dim))

    def tables(self, queries: Sequence[int], keys: Sequence[int]) -> Tuple[Tensor, ...]:
        """The tables that :func:`attend` takes for maps of (H, W), (Hq, H, C) and (Wq, W, C).

        Nothing without relative positions.
        """
        if self.rel_pos_h is None:
            return ()
        return (
            relative_table(self.rel_pos_h, queries[0], keys[0]),
            relative_table(self.rel_pos_w, queries[1], keys[1]),
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ('rel_pos_h', 'rel_pos_w'):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and given is not None and given.dim() == 2 and len(given) != len(own):
                state_dict[prefix + name] = resize_table(given, len(own))
                print_log(f'Attention: {prefix}{name} resized from {len(given)} to {len(own)}', logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)


class Attention(RelativeAttention):
    """Multi-head self-attention over a map, in windows or whole, or over a sequence.

    Attention: https://arxiv.org/abs/1706.03762; in windows as in ViTDet, https://arxiv.org/abs/2203.16527.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        window_size: Side of the square windows, in tokens; 0 attends to all. Maps that it does not
            divide are padded with zeros, which attend and are attended to.
        rel_pos_size: See :class:`RelativeAttention`.
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
        super().__init__(dim // num_heads, rel_pos_size)
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.rel_pos_scale = (dim // num_heads) ** -0.5 if rel_pos_scaled else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), or (B, N, C) -> (B, N, C) without windows and positions."""
        size = x.shape[1:-1]
        if self.window_size:
            x = partition_windows(x, self.window_size)
        q, k, v = (
            y.flatten(1, -2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, C)
            for y in split_linear(self.qkv, x, 3)
        )
        tables = (self.rel_pos_scale * table for table in self.tables(x.shape[1:3], x.shape[1:3]))
        x = attend(q, k, v, *tables).transpose(1, 2).reshape(x.shape)
        if self.window_size:
            x = merge_windows(x, size)
        return self.proj(x)
