"""Multi-head attention by ``scaled_dot_product_attention``, without a matrix of N x N scores in Python.

Decomposed relative positions lengthen queries, keys and values by H + W channels, see :mod:`.rel_pos`.
"""

from typing import Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from einops import rearrange
from mmengine.logging import print_log
from torch import Tensor, nn

from .rel_pos import concat_rel_pos, get_rel_pos, resize_rel_pos
from .rope import apply_rotary
from .windows import window_partition, window_unpartition

# torch.fx records calls of wrapped functions instead of tracing their branches on sizes.
for _function in (
    'get_rel_pos',
    'rel_pos_attention_flash',
    'sdpa',
    'split_heads',
    'window_partition',
    'window_unpartition',
):
    torch.fx.wrap(_function)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, ..., heads * head_dim) -> (B, heads, N, head_dim), N the product of the sizes in between."""
    return rearrange(x, 'b ... (heads c) -> b heads (...) c', heads=num_heads)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor] = None, scale: Optional[float] = None) -> Tensor:
    """Scaled dot-product attention, ``softmax(q k^T * scale) v`` (https://arxiv.org/abs/1706.03762).

    Args:
        q: (B, heads, Nq, C).
        k: (B, heads, N, C).
        v: (B, heads, N, Cv).
        mask: (B, 1, 1, N), True for keys that are attended to, at least one per query; None attends to all.
        scale: Factor of the scores; None is ``C**-0.5``.

    Returns:
        (B, heads, Nq, Cv).
    """
    value_width = v.shape[-1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = pad_for_flash(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[..., :value_width]


def pad_for_flash(q: Tensor, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Pads channels with zeros: flash kernels need values as wide as queries and keys."""
    width, value_width = q.shape[-1], v.shape[-1]
    if value_width < width:
        v = F.pad(v, (0, width - value_width))
    elif value_width > width:
        q, k = (F.pad(y, (0, value_width - width)) for y in (q, k))
    return q, k, v


def query_weights(q: Tensor, k: Tensor, token: int, scale: float, mask: Optional[Tensor] = None) -> Tensor:
    """Returns the softmax weights of one query, for analysis.

    Args:
        q: (B, heads, Nq, C).
        k: (B, heads, N, C).
        token: Index of the query.
        scale: Factor of the scores.
        mask: (N,), True for keys that are attended to; None attends to all.

    Returns:
        (B, heads, N).
    """
    scores = (scale * k @ q[:, :, token, :, None])[..., 0]
    return (scores if mask is None else scores.masked_fill(~mask, float('-inf'))).softmax(-1)


def rel_pos_attention_flash(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Attention with decomposed relative positions in a form that flash kernels take, see :mod:`.rel_pos`.

    Args:
        q: (B, heads, Hq * Wq, C), tokens of a map in row-major order.
        k: (B, heads, H * W, C).
        v: (B, heads, H * W, C).
        rel_h: (Hq, H, C), see :func:`.get_rel_pos`.
        rel_w: (Wq, W, C).

    Returns:
        (B, heads, Hq * Wq, C).
    """
    q, k, scale = concat_rel_pos(q, k, rel_h, rel_w)
    return sdpa(q, k, v, scale=scale)


class RelPosAttention(nn.Module):
    """Base of attention layers: owns the tables of relative positions, if any, and chooses the kernel.

    Args:
        head_dim: Channels of a head.
        input_size: (H, W) in tokens that the tables are learned for: the finer of query and key map, not the input of
            the block as in Detectron2. The tables have 2 H - 1 and 2 W - 1 rows. They are interpolated for maps of
            other sizes, and when those of a checkpoint have another length. None disables relative positions.

    Attributes:
        rel_pos_kernel: Function in place of :func:`rel_pos_attention_flash`, with the same arguments. On a CPU
            :func:`mmvitzoo.optimize_for_inference` sets it.
    """

    rel_pos_kernel: Optional[Callable[..., Tensor]] = None

    def __init__(self, head_dim: int, input_size: Optional[Tuple[int, int]]):
        super().__init__()
        self.rel_pos_scale = 1.0  # of the relative scores; applied to the embeddings, which is equivalent
        if input_size is None:
            self.rel_pos_h = self.rel_pos_w = None
        else:
            height, width = input_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, head_dim))

    def gather_rel_pos(self, q_size: Sequence[int], k_size: Sequence[int]) -> Tuple[Tensor, Tensor]:
        """Looks up the relative positions of maps of (Hq, Wq) and (H, W): (Hq, H, C) and (Wq, W, C)."""
        rel_h = get_rel_pos(q_size[0], k_size[0], self.rel_pos_h)
        rel_w = get_rel_pos(q_size[1], k_size[1], self.rel_pos_w)
        return self.rel_pos_scale * rel_h, self.rel_pos_scale * rel_w

    def attention(self, q: Tensor, k: Tensor, v: Tensor, q_size: Sequence[int], k_size: Sequence[int]) -> Tensor:
        """Attention of (B, heads, N, C), with relative positions if the layer has tables."""
        if self.rel_pos_h is None:
            return sdpa(q, k, v)
        kernel = self.rel_pos_kernel or rel_pos_attention_flash
        return kernel(q, k, v, *self.gather_rel_pos(q_size, k_size))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ('rel_pos_h', 'rel_pos_w'):
            own, loaded = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and loaded is not None and loaded.dim() == 2 and len(loaded) != len(own):
                state_dict[prefix + name] = resize_rel_pos(loaded, len(own))
                print_log(f'resized {prefix}{name} from length {len(loaded)} to {len(own)}', logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)


class Attention(RelPosAttention):
    """Multi-head self-attention (https://arxiv.org/abs/1706.03762), global or in the windows of ViTDet.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Number of heads.
        window_size: Side of the square windows in tokens; 0 is global attention. Maps are padded with zeros to a
            multiple of it. Padding is not masked, as in ViTDet (https://arxiv.org/abs/2203.16527).
        input_size: (H, W) in tokens of the relative positions, see :class:`.RelPosAttention`.
        rel_pos_scaled: Compute relative scores from ``q * head_dim**-0.5``, as the ViTDet of the ViTAE authors does,
            instead of from ``q``, as Detectron2, Segment Anything and Hugging Face do.
        qkv_bias: Add a bias to queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 0,
        input_size: Optional[Tuple[int, int]] = None,
        rel_pos_scaled: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__(dim // num_heads, input_size)
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if rel_pos_scaled:
            self.rel_pos_scale = (dim // num_heads) ** -0.5

    def split_qkv(self, x: Tensor) -> Tuple[Tensor, ...]:
        """(B, ..., C) -> queries, keys and values of (B, heads, N, head_dim)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return tuple(split_heads(y, self.num_heads) for y in (q, k, v))

    def forward(self, x: Tensor, rope: Optional[Tuple[Tensor, Tensor, bool]] = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), or (B, N, C) -> (B, N, C) if global and without relative positions.

        ``rope`` rotates queries and keys: cosines and sines of (N, head_dim / 2), or (heads, N, head_dim / 2), and True
        for pairs of neighboring channels, see :func:`.apply_rotary`.
        """
        size = x.shape[1:-1]
        if self.window_size:
            x = window_partition(x, self.window_size)  # (B * windows, window_size, window_size, C)
        q, k, v = self.split_qkv(x)  # (B * windows, heads, N, head_dim)
        if rope is not None:
            q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        # The sizes (H, W) are not read without relative positions, where x may be (B, N, C).
        y = self.attention(q, k, v, x.shape[1:3], x.shape[1:3])
        x = y.transpose(1, 2).reshape(x.shape)  # (B * windows, heads, N, head_dim) -> (B * windows, ..., C)
        if self.window_size:
            x = window_unpartition(x, size)
        return self.proj(x)

    def attention_weights(
        self, x: Tensor, window: int, token: int, rope: Optional[Tuple[Tensor, Tensor, bool]] = None
    ) -> Tensor:
        """Returns the weights of one query.

        Args:
            x: Input of ``forward``, a batch of one.
            window: Index of the query's window, in row-major order over the padded map; 0 without windows.
            token: Index of the query in row-major order, in its window with padding. Without windows prefix tokens
                come first.
            rope: Rotation of queries and keys, as in ``forward``.

        Returns:
            (heads, N), the weight of each token of the window.
        """
        if self.window_size:
            x = window_partition(x, self.window_size)[window, None]
        q, k, _ = self.split_qkv(x)
        if rope is not None:
            q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        scale = q.shape[-1] ** -0.5
        if self.rel_pos_h is not None:
            q, k, scale = concat_rel_pos(q, k, *self.gather_rel_pos(x.shape[1:3], x.shape[1:3]))
        return query_weights(q, k, token, scale)[0]
