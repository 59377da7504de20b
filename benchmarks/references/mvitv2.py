"""Reference implementation of MViTv2 with every attention score in memory.

Parameters have the names of :class:`mmvitzoo.models.MViTv2`. The arithmetic is that of the usual public
implementations: a score matrix for each head, a matrix of relative positions added to it, and copies for windows.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ReferenceAttention(nn.Module):
    """Pooling attention with relative positions; ``rel_pos_lengths`` are the lengths of the two tables."""

    def __init__(self, dim, out_dim, num_heads, stride_q, stride_kv, window_size, rel_pos_lengths):
        super().__init__()
        self.num_heads, self.window_size, self.head_dim = num_heads, window_size, out_dim // num_heads
        self.qkv = nn.Linear(dim, 3 * out_dim)
        for name, stride in (('q', stride_q), ('k', stride_kv), ('v', stride_kv)):
            conv = nn.Conv2d(self.head_dim, self.head_dim, 3, stride, 1, groups=self.head_dim, bias=False)
            setattr(self, f'pool_{name}', conv)
            setattr(self, f'norm_{name}', nn.LayerNorm(self.head_dim, eps=1e-6))
        self.rel_pos_h = nn.Parameter(torch.zeros(rel_pos_lengths[0], self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(rel_pos_lengths[1], self.head_dim))
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x):
        """(B, H, W, C) -> (B, H', W', C')."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height, width, 3, self.num_heads, self.head_dim).permute(3, 0, 4, 5, 1, 2)
        maps = []
        for name, y in zip('qkv', qkv.flatten(1, 2)):
            y = getattr(self, f'pool_{name}')(y)  # (B * heads, C, H, W)
            maps.append(getattr(self, f'norm_{name}')(y.permute(0, 2, 3, 1)))
        q, k, v = maps
        size = q.shape[1:3]
        if self.window_size:
            sides = [self.window_size // getattr(self, f'pool_{name}').stride[0] for name in 'qkv']
            q, k, v = (window_partition(y, side) for y, side in zip((q, k, v), sides))
        scores = (q.flatten(1, 2) * self.head_dim**-0.5) @ k.flatten(1, 2).transpose(1, 2)
        rows = torch.einsum('bhwc,hkc->bhwk', q, get_rel_pos(self.rel_pos_h, q.shape[1], k.shape[1]))
        cols = torch.einsum('bhwc,wkc->bhwk', q, get_rel_pos(self.rel_pos_w, q.shape[2], k.shape[2]))
        scores = scores.view(*q.shape[:3], *k.shape[1:3]) + rows[..., None] + cols[..., None, :]
        x = scores.flatten(3).flatten(1, 2).softmax(-1) @ v.flatten(1, 2)
        x = x.view(q.shape) + q
        if self.window_size:
            x = window_unpartition(x, size)
        return self.proj(x.unflatten(0, (batch, self.num_heads)).permute(0, 2, 3, 1, 4).flatten(3))


def get_rel_pos(rel_pos, q_size, k_size):
    """(L, C) -> (q_size, k_size, C), the relative position of every query and key along one axis."""
    length = 2 * max(q_size, k_size) - 1
    if len(rel_pos) != length:
        rel_pos = F.interpolate(rel_pos.T[None], length, mode='linear')[0].T
    q_coords = torch.arange(q_size)[:, None] * max(k_size / q_size, 1.0)
    k_coords = torch.arange(k_size)[None] * max(q_size / k_size, 1.0)
    return rel_pos[(q_coords - k_coords + (k_size - 1) * max(q_size / k_size, 1.0)).long()]


def window_partition(x, side):
    """(B, H, W, C) -> (B * windows, side, side, C), padded with zeros."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    batch, height, width, channels = x.shape
    x = x.view(batch, height // side, side, width // side, side, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, channels)


def window_unpartition(windows, size):
    """(B * windows, side, side, C) -> (B, H, W, C) for ``size`` (H, W)."""
    side, channels = windows.shape[1], windows.shape[-1]
    rows, cols = -(-size[0] // side), -(-size[1] // side)
    x = windows.view(-1, rows, cols, side, side, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * side, cols * side, channels)[:, : size[0], : size[1]].contiguous()


class ReferenceMlp(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, dim, hidden_dim, out_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ReferenceBlock(nn.Module):
    """Transformer block that may change the width in its attention or in its MLP."""

    def __init__(self, dim, attn_dim, out_dim, stride, **attention):
        super().__init__()
        self.stride, self.dims = stride, (dim, attn_dim, out_dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReferenceAttention(dim, attn_dim, stride_q=stride, **attention)
        self.norm2 = nn.LayerNorm(attn_dim, eps=1e-6)
        self.mlp = ReferenceMlp(attn_dim, 4 * attn_dim, out_dim)
        if dim != out_dim:
            self.shortcut_proj = nn.Linear(dim, out_dim)

    def forward(self, x):
        """(B, H, W, C) -> (B, H', W', C')."""
        dim, attn_dim, out_dim = self.dims
        y = self.norm1(x)
        shortcut = self.shortcut_proj(y) if dim != attn_dim else x
        if self.stride > 1:
            shortcut = F.max_pool2d(shortcut.permute(0, 3, 1, 2), 3, self.stride, 1).permute(0, 2, 3, 1)
        x = shortcut + self.attn(y)
        y = self.norm2(x)
        return (self.shortcut_proj(y) if attn_dim != out_dim else x) + self.mlp(y)


class ReferenceMViTv2(nn.Module):
    """Reference network with the form and the weights of a given :class:`mmvitzoo.models.MViTv2`."""

    def __init__(self, model):
        super().__init__()
        self.last_blocks = {model.starts[stage + 1] - 1: stage for stage in model.out_indices}
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, model.patch_embed.proj.out_channels, 7, 4, 3)))
        self.blocks = nn.ModuleList()
        for block in model.blocks:
            attn = block.attn
            reference = ReferenceBlock(
                block.norm1.normalized_shape[0],
                block.norm2.normalized_shape[0],
                block.mlp.fc2.out_features,
                block.stride,
                num_heads=attn.num_heads,
                stride_kv=attn.stride_kv,
                window_size=attn.window_size,
                rel_pos_lengths=(len(attn.rel_pos_h), len(attn.rel_pos_w)),
            )
            self.blocks.append(reference)
        for stage in model.out_indices:
            setattr(self, f'norm{stage}', nn.LayerNorm(getattr(model, f'norm{stage}').normalized_shape, eps=1e-6))
        self.load_state_dict(model.state_dict())

    def forward(self, x):
        """(B, 3, H, W) -> normalized maps of the stages in ``out_indices``."""
        x = self.patch_embed['proj'](x).permute(0, 2, 3, 1)
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.last_blocks:
                norm = getattr(self, f'norm{self.last_blocks[i]}')
                outs.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)
